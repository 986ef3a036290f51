"""Latents, text features and noise level to velocity."""

from .graph import BlockGraphs
from .nag import NAG_OFF, NagOptions, Negative, warn_without_effect
from .run import DenoiserRun
from .step_cache import DEFAULT_THRESHOLD, STEP_CACHE_OFF, StepCache, StepCacheOptions
from .transformer import LensDenoiser

__all__ = [
    "DEFAULT_THRESHOLD",
    "NAG_OFF",
    "STEP_CACHE_OFF",
    "BlockGraphs",
    "DenoiserRun",
    "LensDenoiser",
    "NagOptions",
    "Negative",
    "StepCache",
    "StepCacheOptions",
    "warn_without_effect",
]
