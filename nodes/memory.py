"""How much GPU memory a picture takes."""

from comfy_api.latest import io

from .host.memory import estimate
from .host.progress import say


class LensMemoryEstimate(io.ComfyNode):
    """Models and a latent -> what a picture takes of the GPU, before it is drawn."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensMemoryEstimate",
            display_name="Lens Memory Estimate",
            category="Lens/loaders",
            description=(
                "GB of GPU memory that these models need for a picture of this size: all of them staying "
                "there, each leaving when it is done, or streamed by layers. Nothing is loaded for it."
            ),
            search_aliases=["microsoft lens", "vram", "gpu memory", "out of memory"],
            inputs=[
                io.Model.Input("model", tooltip="From LensModelLoader."),
                io.Clip.Input("clip", tooltip="From LensEncoderLoader."),
                io.Vae.Input("vae", tooltip="From LensVAELoader."),
                io.Latent.Input("latent", tooltip="Its size and batch are the picture's."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Noise levels, 1.8 MB each."),
                io.Int.Input(
                    "text_tokens",
                    default=200,
                    min=0,
                    max=8192,
                    tooltip="The prompt's, as LensTextEncode shows.",
                ),
                io.Float.Input(
                    "vram_gb",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="Memory to plan for, in GB of 10^9 bytes. 0: what this GPU has free for models.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.String.Output(display_name="estimate", tooltip="The text that the node shows.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, vae, latent, steps, text_tokens, vram_gb) -> io.NodeOutput:
        text = estimate(model, clip, vae, latent, steps, text_tokens, vram_gb)
        say(text, getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(text)
