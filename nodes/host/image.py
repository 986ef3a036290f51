"""Pictures into latents with the VAE that a node was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...lens_core.config import LATENT_CHANNELS
from ...lens_core.errors import SettingError
from ...lens_core.sampling import (
    bucket_like,
    fit_image,
    fit_mask,
    mask_of_tokens,
    pixels_of_tokens,
    placement,
)
from .sampling import Latent, require_vae


def image_to_latent(
    image: Tensor, vae: Any, base_resolution: int, fit: str, mask: Tensor | None = None
) -> tuple[Latent, Tensor, Tensor]:
    """Pictures [B, H, W, C] -> LATENT in the bucket nearest in shape; the pictures [B, h, w, 3] that were
    encoded; and 1 where samplers redraw them, [B or 1, h, w].

    With a ``mask``, or padding, the LATENT has a noise mask of both; without, all is redrawn. Raises
    SettingError for another model's VAE.
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
    fitted = fit_image(image, place)
    latent: Latent = {"samples": vae.encode(fitted)}
    tokens = mask_of_tokens(fit_mask(mask, given, place))
    if mask is None and not tokens.any():
        return latent, fitted, pixels_of_tokens(torch.ones_like(tokens))
    return {**latent, "noise_mask": tokens}, fitted, pixels_of_tokens(tokens)
