"""A report on ComfyUI, the computer and the model files, for when something is wrong."""

from comfy_api.latest import io

from .host.doctor import ALL, report
from .host.progress import say


class LensDoctor(io.ComfyNode):
    """Models and files -> a report fit to be pasted into an issue."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensDoctor",
            display_name="Lens Doctor",
            category="Lens/loaders",
            description=(
                "Reports on versions and GPUs, which fast paths run here (each is tested) and why not the "
                "others, and what each Lens file is and whether it is whole. It names no folders: paste it "
                "into an issue. Run it alone, or connect models to have them described."
            ),
            search_aliases=["microsoft lens", "check", "diagnose", "debug", "bug report", "sha256", "health"],
            inputs=[
                io.String.Input(
                    "files",
                    multiline=True,
                    default=ALL,
                    tooltip="Names as the Lens loaders list them, one a line; all: every file. Empty: none.",
                ),
                io.Boolean.Input(
                    "hash",
                    default=False,
                    tooltip="Also SHA-256 of each file beside the published one. Reads all of it.",
                ),
                io.Boolean.Input(
                    "parity",
                    default=False,
                    tooltip=(
                        "Also compute with each file and compare with transformers (encoder), ComfyUI's own "
                        "Lens (denoiser) and diffusers (VAE). Takes minutes; models leave the GPU first."
                    ),
                ),
                io.Model.Input("model", optional=True, tooltip="To be described."),
                io.Clip.Input("clip", optional=True, tooltip="To be described."),
                io.Vae.Input("vae", optional=True, tooltip="To be described."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.String.Output(display_name="report", tooltip="The text that the node shows.")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        """Never the same: the computer and the files may have changed since."""
        return float("nan")

    @classmethod
    def execute(cls, files=ALL, hash=False, parity=False, model=None, clip=None, vae=None) -> io.NodeOutput:
        text = report(model, clip, vae, files, hash, parity)
        say(text, getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(text)
