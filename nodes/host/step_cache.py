"""lens_core's step cache in ComfyUI: its settings on a MODEL, and one cache for each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...lens_core.denoiser import STEP_CACHE_OFF, StepCache, StepCacheOptions
from ...lens_core.errors import SettingError
from ...lens_core.interval import Interval
from .denoiser import HostDenoiser

# Where transformer_options keep a MODEL's StepCacheOptions.
_SETTINGS = "lens_step_cache"


def with_step_cache(model, threshold: float, start: float, end: float, max_consecutive: int):
    """A clone of MODEL that skips steps; raises SettingError unless it is one of LensModelLoader's."""
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    if not isinstance(network, HostDenoiser):
        raise SettingError(
            f"The model's network is {type(network).__name__}; this node works inside the one of "
            "LensModelLoader. Load the file with that, or use ComfyUI's EasyCache, which takes any model."
        )
    options = StepCacheOptions(threshold, Interval(start, end), max_consecutive)
    model = model.clone()
    model.model_options["transformer_options"][_SETTINGS] = options
    return model


def cache_of(transformer_options: dict[str, Any], levels: Sequence[float]) -> StepCache | None:
    """A new cache for a run over ``levels``; None if no node asked for one."""
    return StepCache.of(transformer_options.get(_SETTINGS, STEP_CACHE_OFF), levels)
