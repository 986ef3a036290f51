"""Noise levels, guidance, the Euler loop, starting noise and sizes."""

from .guidance import is_guided, norm_rescaled_guidance
from .loop import euler
from .noise import grid_to_tokens, reference_noise, tokens_to_grid
from .resolution import (
    ASPECT_RATIOS,
    BASE_RESOLUTIONS,
    BUCKETS,
    bucket,
    check_size,
    nearest_bucket,
    token_grid,
)
from .schedule import empirical_mu, partial_sigmas, sigmas

__all__ = [
    "ASPECT_RATIOS",
    "BASE_RESOLUTIONS",
    "BUCKETS",
    "bucket",
    "check_size",
    "empirical_mu",
    "euler",
    "grid_to_tokens",
    "is_guided",
    "nearest_bucket",
    "norm_rescaled_guidance",
    "partial_sigmas",
    "reference_noise",
    "sigmas",
    "token_grid",
    "tokens_to_grid",
]
