"""What one sampling run keeps between its steps, and what it lets go of before the first."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ...lens_core.denoiser import DenoiserRun
from ...lens_core.denoiser.modulation import modulation_bytes
from .denoiser import RUN, HostDenoiser
from .step_cache import cache_of

log = logging.getLogger(__name__)


def sample_with_run(executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, *rest: Any) -> Any:
    """A SAMPLER_SAMPLE wrapper: the run's noise levels are known now, so their modulation is computed now."""
    options = extra_args["model_options"]["transformer_options"]
    cache = cache_of(options, sigmas)
    options[RUN] = run = DenoiserRun((level for level in sigmas.tolist() if level > 0), cache)
    denoiser = guider.inner_model.diffusion_model
    if isinstance(denoiser, HostDenoiser) and len(sigmas):
        patcher, dtype = guider.model_patcher, guider.inner_model.get_dtype_inference()
        run.modulation(denoiser, sigmas[:1].to(patcher.load_device), dtype)
        _make_room(guider, patcher, denoiser, rest)
    result = executor(guider, sigmas, extra_args, *rest)
    if cache is not None:
        log.info("Lens: %s.", cache.summary(len(denoiser.blocks)))
    return result


def _make_room(guider: Any, patcher: Any, denoiser: HostDenoiser, rest: tuple) -> None:
    """Take the modulation's weights off the GPU if the steps need their room; say what was done."""
    size = modulation_bytes(denoiser)
    noise = next(value for value in rest if isinstance(value, Tensor))
    needed = guider.inner_model.memory_required(list(noise.shape))
    free = patcher.get_free_memory(patcher.load_device)
    if free < needed:
        patcher.partially_unload(patcher.offload_device, size)
    log.info(
        "Lens: the steps do without the %.2f GB of modulation weights (%s); %.2f of %.2f GB are on %s.",
        size / 1e9,
        "released" if free < needed else "where memory is free they stay",
        patcher.loaded_size() / 1e9,
        patcher.model_size() / 1e9,
        patcher.load_device,
    )
