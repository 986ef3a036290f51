"""A MODEL with its LoRAs, merged into a file."""

from comfy_api.latest import io

from .host.progress import say
from .host.save import fingerprint, save_model


class LensSaveModel(io.ComfyNode):
    """MODEL with all its patches -> a file in models/diffusion_models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensSaveModel",
            display_name="Lens Save Model",
            category="Lens/loaders",
            description=(
                "Writes a Lens MODEL with its LoRAs merged to a file, which then loads and draws without "
                "them. Quantised weights stay quantised. When it is done, press R."
            ),
            search_aliases=["microsoft lens", "bake lora", "merge lora", "save checkpoint", "export model"],
            inputs=[
                io.Model.Input("model", tooltip="From LensLoraLoader, or any MODEL of Lens with patches."),
                io.String.Input(
                    "file_name",
                    default="lens_merged",
                    tooltip="The file in models/diffusion_models, or a folder in there and the file.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Replace a file of that name. Off: that is an error.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.String.Output(display_name="file_name", tooltip="As the loaders list the file.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file_name="", **_):
        """A file that was deleted is written again; a linked value is None here."""
        return fingerprint(file_name or "")

    @classmethod
    def execute(cls, model, file_name: str, overwrite: bool = False) -> io.NodeOutput:
        option, text = save_model(model, file_name, overwrite)
        say(text, getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(option)
