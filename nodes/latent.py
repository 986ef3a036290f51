"""Empty latents in Lens' sizes."""

from comfy_api.latest import io

from ..lens_core.sampling import ASPECT_RATIOS, BASE_RESOLUTIONS, bucket
from .host.sampling import empty_latent


class LensEmptyLatent(io.ComfyNode):
    """Base resolution and aspect ratio -> LATENT and its size in pixels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensEmptyLatent",
            display_name="Lens Empty Latent",
            category="Lens/latent",
            description="An empty latent in one of the sizes that Lens was made for.",
            search_aliases=["microsoft lens", "resolution", "aspect ratio", "size", "bucket"],
            inputs=[
                io.Combo.Input(
                    "base_resolution",
                    options=[str(base) for base in BASE_RESOLUTIONS],
                    default="1024",
                    tooltip=(
                        "The picture has about this number squared of pixels, in any shape. 256 is for nano "
                        "Lens."
                    ),
                ),
                io.Combo.Input(
                    "aspect_ratio",
                    options=list(ASPECT_RATIOS),
                    default="1:1",
                    tooltip="Width to height.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures drawn at once."),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="For LensSampler or any sampler."),
                io.Int.Output(display_name="width", tooltip="In pixels."),
                io.Int.Output(display_name="height", tooltip="In pixels."),
            ],
        )

    @classmethod
    def execute(cls, base_resolution: str, aspect_ratio: str, batch_size: int) -> io.NodeOutput:
        height, width = bucket(int(base_resolution), aspect_ratio)
        return io.NodeOutput(empty_latent(height, width, batch_size), width, height)
