"""Latents in Lens' sizes: empty ones, and those of pictures."""

from comfy_api.latest import io

from ..lens_core.sampling import ASPECT_RATIOS, BASE_RESOLUTIONS, FITS, bucket
from .host.image import image_to_latent
from .host.sampling import empty_latent


def base_resolution() -> io.Input:
    """The combo of LensEmptyLatent, which other nodes have too."""
    return io.Combo.Input(
        "base_resolution",
        options=[str(base) for base in BASE_RESOLUTIONS],
        default="1024",
        tooltip="The picture has about this number squared of pixels, in any shape. 256 is for nano Lens.",
    )


class LensEmptyLatent(io.ComfyNode):
    """Base resolution and aspect ratio -> LATENT and its size in pixels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensEmptyLatent",
            display_name="Lens Empty Latent",
            category="Lens/latent",
            description="An empty latent in one of the sizes that Lens was made for.",
            search_aliases=[
                "microsoft lens",
                "text to image",
                "resolution",
                "aspect ratio",
                "size",
                "bucket",
            ],
            inputs=[
                base_resolution(),
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


class LensImageToLatent(io.ComfyNode):
    """IMAGE, and a mask of it -> LATENT in the nearest of Lens' sizes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensImageToLatent",
            display_name="Lens Image To Latent",
            category="Lens/latent",
            description=(
                "Brings pictures to the nearest of Lens' sizes and encodes them, for image to image, "
                "inpainting (with a mask), outpainting (with pad) and a second, larger pass."
            ),
            search_aliases=["microsoft lens", "img2img", "inpaint", "outpaint", "vae encode", "hires fix"],
            inputs=[
                io.Image.Input("image", tooltip="One picture or a batch. Transparency is left out."),
                io.Vae.Input("vae", tooltip="From LensVAELoader, or VAELoader with flux2-vae."),
                base_resolution(),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default=FITS[0],
                    tooltip=(
                        "How it gets the nearest of the nine aspect ratios. crop: cut off what is too long, "
                        "on both sides. pad: keep all; the border is masked and drawn anew (below denoise 1 "
                        "it starts from the picture's edges, repeated). stretch: change the proportions."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "White is redrawn, in whole squares of 16 pixels; the rest is kept. It is fitted as "
                        "the picture is."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="LATENT", tooltip="For LensSampler; with a noise mask, for a mask or pad."
                ),
                io.Image.Output(display_name="image", tooltip="The pictures that were encoded."),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="White where samplers redraw them; put the result there by ImageCompositeMasked.",
                ),
            ],
        )

    @classmethod
    def execute(cls, image, vae, base_resolution: str, fit: str, mask=None) -> io.NodeOutput:
        return io.NodeOutput(*image_to_latent(image, vae, int(base_resolution), fit, mask))
