"""Noise levels, guidance, the Euler loop, starting noise, sizes, and pictures brought to them."""

from .fit import FITS, fit_image, fit_mask, mask_of_tokens, pixels_of_tokens, placement
from .guidance import is_guided, norm_rescaled_guidance
from .loop import euler
from .noise import grid_to_tokens, reference_noise, slerp, tokens_to_grid
from .resolution import (
    ASPECT_RATIOS,
    BASE_RESOLUTIONS,
    BUCKETS,
    bucket,
    bucket_like,
    check_size,
    nearest_bucket,
    token_grid,
)
from .schedule import BY_STEPS, DENOISE_BY, empirical_mu, partial_sigmas, sigmas

__all__ = [
    "ASPECT_RATIOS",
    "BASE_RESOLUTIONS",
    "BUCKETS",
    "BY_STEPS",
    "DENOISE_BY",
    "FITS",
    "bucket",
    "bucket_like",
    "check_size",
    "empirical_mu",
    "euler",
    "fit_image",
    "fit_mask",
    "grid_to_tokens",
    "is_guided",
    "mask_of_tokens",
    "nearest_bucket",
    "norm_rescaled_guidance",
    "partial_sigmas",
    "pixels_of_tokens",
    "placement",
    "reference_noise",
    "sigmas",
    "slerp",
    "token_grid",
    "tokens_to_grid",
]
