"""What one sampling run keeps between its steps, and what it lets go of before the first."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
from torch import Tensor

from ...lens_core.denoiser import DenoiserRun
from ...lens_core.denoiser.modulation import modulation_bytes
from .denoiser import RUN, HostDenoiser
from .graphs import graphs_of_run

log = logging.getLogger(__name__)


def sample_with_run(executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, *rest: Any) -> Any:
    """A SAMPLER_SAMPLE wrapper: the run's noise levels are known now, so their modulation is computed now."""
    run = DenoiserRun(level for level in sigmas.tolist() if level > 0)
    extra_args["model_options"]["transformer_options"][RUN] = run
    denoiser = guider.inner_model.diffusion_model
    if isinstance(denoiser, HostDenoiser) and len(sigmas):
        patcher, dtype = guider.model_patcher, guider.inner_model.get_dtype_inference()
        run.modulation(denoiser, sigmas[:1].to(patcher.load_device), dtype)
        _make_room(guider, patcher, denoiser, rest)
    with graphs_of_run(guider.model_patcher, extra_args["model_options"]):
        return executor(guider, sigmas, extra_args, *rest)


def _make_room(guider: Any, patcher: Any, denoiser: HostDenoiser, rest: tuple) -> None:
    """Take the modulation's weights off the GPU as far as the steps need their room; say what was done."""
    noise = next(value for value in rest if isinstance(value, Tensor))
    device = patcher.load_device
    missing = guider.inner_model.memory_required(list(noise.shape)) - patcher.get_free_memory(device)
    size = modulation_bytes(denoiser)
    # What is loaded beyond the others is the modulation's: ComfyUI loads that last.
    there = patcher.loaded_size() - (patcher.model_size() - size)
    # ComfyUI frees a byte more than it is asked for, and what it would need to stream that in the steps.
    more = 1 + comfy.model_management.NUM_STREAMS * size / (2 * len(denoiser.blocks))
    asked, released = min(there - more, missing), 0
    if asked > 0 and device != patcher.offload_device:
        released = patcher.partially_unload(patcher.offload_device, asked)
    log.info(
        "Lens: the steps do without %.2f GB of modulation weights; %s. %.2f of %.2f GB are on %s.",
        size / 1e9,
        f"{released / 1e9:.2f} GB of them were released" if released > 0 else "what fits of them stays",
        patcher.loaded_size() / 1e9,
        patcher.model_size() / 1e9,
        device,
    )
