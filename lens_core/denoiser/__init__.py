"""Latents, text features and noise level to velocity."""

from .graph import BlockGraphs
from .run import DenoiserRun
from .step_cache import DEFAULT_THRESHOLD, STEP_CACHE_OFF, StepCache, StepCacheOptions
from .transformer import LensDenoiser

__all__ = [
    "DEFAULT_THRESHOLD",
    "STEP_CACHE_OFF",
    "BlockGraphs",
    "DenoiserRun",
    "LensDenoiser",
    "StepCache",
    "StepCacheOptions",
]
