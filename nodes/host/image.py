"""Pictures into latents with the VAE that a node was given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...lens_core.config import LATENT_CHANNELS
from ...lens_core.errors import SettingError
from ...lens_core.sampling import bucket_like, fit_image, fit_mask, mask_of_tokens, placement
from .sampling import Latent, require_vae


def image_to_latent(
    image: Tensor, vae: Any, base_resolution: int, fit: str, mask: Tensor | None = None
) -> tuple[Latent, Tensor, Tensor]:
    """Pictures [B, H, W, C] -> LATENT in the bucket nearest in shape; the pictures [B, h, w, 3] that were
    encoded; and what is to be redrawn of them, [B or 1, h, w]: ``mask`` and padding.

    The LATENT has a noise mask if there is anything to keep. Raises SettingError for another model's VAE.
    """
    require_vae(vae)
    channels = getattr(vae, "latent_channels", LATENT_CHANNELS[0])
    if channels not in LATENT_CHANNELS:
        raise SettingError(
            f"The VAE's latents have {channels} channels; Lens' have {LATENT_CHANNELS[0]}. Use "
            "LensVAELoader, or VAELoader with flux2-vae."
        )
    given = tuple(image.shape[1:3])
    place = placement(*given, bucket_like(base_resolution, *given), fit)
    fitted, redrawn = fit_image(image, place), fit_mask(mask, given, place)
    latent: Latent = {"samples": vae.encode(fitted)}
    if mask is not None or redrawn.any():
        latent["noise_mask"] = mask_of_tokens(redrawn)
    return latent, fitted, redrawn
