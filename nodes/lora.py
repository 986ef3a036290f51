"""A LoRA in any spelling on a MODEL."""

from comfy_api.latest import io

from .host.lora import apply_lora, choices, stamp
from .host.progress import say


class LensLoraLoader(io.ComfyNode):
    """MODEL and a file -> MODEL with the LoRA, and on the node what of the file was used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensLoraLoader",
            display_name="Lens LoRA Loader",
            category="Lens/loaders",
            description=(
                "Puts a LoRA on a Lens MODEL: LoRA, LoHa, LoKr, DoRA and OFT in the spellings of all known "
                "trainers. The node says what matched. Several in a row add up."
            ),
            search_aliases=["microsoft lens", "lora", "lokr", "loha", "dora", "oft", "lycoris", "adapter"],
            inputs=[
                io.Model.Input("model", tooltip="From LensModelLoader, LensAccelerate or UNETLoader."),
                io.Combo.Input(
                    "lora_name",
                    options=choices(),
                    tooltip="A .safetensors file in models/loras. Lens' LoRAs fit Lens, Turbo and Base.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="1: as trained. 0: the model as it is, and the file is not read.",
                ),
                io.String.Input(
                    "block_strengths",
                    default="",
                    optional=True,
                    tooltip=(
                        "Multiplies strength by block (0 to 47) or stream, such as: 0-11: 0.5, 12-47: 1 or "
                        "txt: 0 or all: 0, img 12-20: 1. The last that names a layer counts; others keep 1."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="For LensSampler or another LoRA.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name="", **_):
        """A file replaced under its name is read again; a linked name is None here."""
        return stamp(lora_name or "")

    @classmethod
    def execute(cls, model, lora_name: str, strength: float, block_strengths: str = "") -> io.NodeOutput:
        patched, text = apply_lora(model, lora_name, strength, block_strengths)
        say(text, getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(patched)
