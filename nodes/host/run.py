"""What one sampling run keeps between its steps, and what it lets go of before the first."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...lens_core.denoiser import DenoiserRun
from ...lens_core.denoiser.modulation import modulation_bytes
from .denoiser import RUN, HostDenoiser
from .graphs import graphs_of_run, why_not_now
from .several_gpus import all_done, copies_of
from .step_cache import cache_of

log = logging.getLogger(__name__)


def sample_with_run(executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, *rest: Any) -> Any:
    """A SAMPLER_SAMPLE wrapper: the run's noise levels are known now, so their modulation is computed now."""
    schedule = sigmas.tolist()
    levels = [level for level in schedule if level > 0]
    model_options = extra_args["model_options"]
    options = model_options["transformer_options"]
    denoiser = guider.inner_model.diffusion_model
    run = DenoiserRun(levels)
    if isinstance(denoiser, HostDenoiser) and levels:
        run = _prepared(guider, denoiser, levels, model_options)
        _make_room(guider, guider.model_patcher, denoiser, rest)
        for copy in copies_of(guider.model_patcher):
            network = copy.model.diffusion_model
            run.share_modulation(denoiser, network, copy.load_device)
            _make_room(guider, copy, network, rest)
    options[RUN] = run
    run.cache = cache = cache_of(options, schedule)
    with graphs_of_run(guider.model_patcher, model_options), all_done(model_options):
        result = executor(guider, sigmas, extra_args, *rest)
    if cache is not None:
        log.info("Lens: %s.", cache.summary(len(denoiser.blocks)))
    return result


def _prepared(
    guider: Any, denoiser: HostDenoiser, levels: list[float], model_options: dict[str, Any]
) -> DenoiserRun:
    """A run with its modulation: of the run before if that had the same levels and weights.

    It is kept only where the weights would have to come to the GPU for it again, which takes as long as some
    steps; where they are there, computing it takes a tenth of one.
    """
    patcher, model = guider.model_patcher, guider.inner_model
    dtype = model.get_dtype_inference()
    name = (patcher.patches_uuid, dtype, tuple(levels))
    if why_not_now(patcher, model_options) is not None:  # its name does not tell all of its weights
        name = None
    known, kept = model.kept_modulation
    run = DenoiserRun(levels, kept if name is not None and known == name else None)
    run.modulation(denoiser, torch.tensor(levels[:1], device=patcher.load_device), dtype)
    if _on_gpu(patcher, denoiser) == modulation_bytes(denoiser):
        model.kept_modulation = (None, None)
    elif name is not None and known != name:
        model.kept_modulation = (name, run.in_ram())
    return run


def _on_gpu(patcher: Any, denoiser: HostDenoiser) -> int:
    """Bytes of the modulation's weights on the GPU: what is loaded beyond the others, as these come last."""
    size = modulation_bytes(denoiser)
    return min(size, max(0, patcher.loaded_size() - (patcher.model_size() - size)))


def _make_room(guider: Any, patcher: Any, denoiser: HostDenoiser, rest: tuple) -> None:
    """Take the modulation's weights off the GPU as far as the steps need their room; say what was done."""
    noise = next(value for value in rest if isinstance(value, Tensor))
    device = patcher.load_device
    missing = guider.inner_model.memory_required(list(noise.shape)) - patcher.get_free_memory(device)
    size = modulation_bytes(denoiser)
    # ComfyUI frees a byte more than it is asked for, and what it would need to stream that in the steps.
    more = 1 + comfy.model_management.NUM_STREAMS * size / (2 * len(denoiser.blocks))
    asked, released = min(_on_gpu(patcher, denoiser) - more, missing), 0
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
