"""Latents to pictures."""

from comfy_api.latest import io

from .host.sampling import decode


class LensVAEDecode(io.ComfyNode):
    """LATENT -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LensVAEDecode",
            display_name="Lens VAE Decode",
            category="Lens/latent",
            description="Turns latents into pictures; in tiles where memory is very short.",
            search_aliases=["microsoft lens", "vae decode", "flux2"],
            inputs=[
                io.Latent.Input("latent", tooltip="From LensSampler or any sampler."),
                io.Vae.Input("vae", tooltip="From LensVAELoader, or VAELoader with flux2-vae."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="For SaveImage or PreviewImage.")],
        )

    @classmethod
    def execute(cls, latent, vae) -> io.NodeOutput:
        return io.NodeOutput(decode(latent, vae, getattr(cls.hidden, "unique_id", None)))
