"""Out of memory under ComfyUI: every model unloaded, one more attempt with less, then an error with sizes.

The same for each stage. What "less" is, the stage says: a streamed denoiser or encoder, a VAE alone on the
GPU and then in small tiles, weights quantised on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import torch
from torch import Tensor

from ...lens_core.config import PIXELS_PER_TOKEN
from ...lens_core.memory.recovery import OutOfMemory, recovering, shortage
from ...lens_core.needs import largest_below
from .denoiser import GRAPHS
from .progress import on_progress
from .several_gpus import copies_of, on_as_many_as_can_be

T = TypeVar("T")
CLOSE_OTHERS = "closing other programs that use the GPU"


def is_shortage(error: BaseException) -> bool:
    """Whether ComfyUI takes it for a device without memory, and it has not been tried again yet."""
    management = comfy.model_management
    if isinstance(error, OutOfMemory):
        return False
    if hasattr(management, "is_oom"):
        return management.is_oom(error)
    return isinstance(error, management.OOM_EXCEPTION)  # an older ComfyUI


def unload_everything() -> None:
    """All models off all GPUs, and all memory given back that nothing uses."""
    management = comfy.model_management
    if hasattr(management, "reset_cast_buffers"):  # what weights are streamed through; made anew when needed
        management.reset_cast_buffers()
    management.unload_all_models()
    management.soft_empty_cache()


def with_recovery(
    attempt: Callable[[], T],
    smaller: Callable[[], T],
    *,
    what: str,
    device: torch.device,
    advice: Callable[[], Sequence[str]],
    needed: Callable[[], float | None],
    release: Callable[[], None] = lambda: None,
) -> T:
    """``attempt()``; if ``device`` runs out of memory ``smaller()``, once, with all models unloaded.

    ``release`` lets go of what a failed attempt has left behind. If memory runs out again, the error has what
    was ``needed`` and the ``advice``. All other errors, and Cancel, pass.
    """

    def free() -> None:
        release()
        unload_everything()

    def explain() -> OutOfMemory:
        there = comfy.model_management.get_free_memory(device)
        return shortage(what, needed(), there, advice())

    return recovering(attempt, smaller, what=what, free=free, explain=explain, is_shortage=is_shortage)


def sample_with_recovery(
    executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """An OUTER_SAMPLE wrapper: all of a run, from loading the model on, and once more with streamed weights.

    The second run begins at step 0 with the same noise, so it draws the same picture.
    """
    guider = executor.class_obj
    patcher, before = guider.model_patcher, _Before(guider)
    model = patcher.model

    def run() -> Any:  # uni_pc writes into the levels
        return executor(noise, latent, sampler, sigmas.clone(), *args, **kwargs)

    def streamed() -> Any:
        on_progress()(0, len(sigmas) - 1)  # the sampler's own bar shows no step a second time
        with ExitStack() as streaming:
            for each in (patcher, *copies_of(patcher)):
                streaming.enter_context(each.model.streaming())
            return run()

    def needed() -> float:
        return comfy.sampler_helpers.estimate_memory(patcher, noise.shape, before.conds)[1]

    def advice() -> list[str]:
        tips = [_smaller_size(model, noise, comfy.model_management.get_free_memory(patcher.load_device))]
        if len(noise) > 1:
            tips.append(f"fewer than {len(noise)} pictures at once")
        if not model.quantized:
            tips.append("LensModelLoader's quantization int8_dynamic or uint4_sdnq")
        return [*tips, CLOSE_OTHERS, "starting ComfyUI with --reserve-vram 2, which leaves room to spare"]

    with on_as_many_as_can_be(patcher):
        if torch.is_grad_enabled():  # a training node: its steps change weights, and cannot be taken again
            return run()
        return with_recovery(
            run,
            streamed,
            what="while sampling",
            device=patcher.load_device,
            advice=advice,
            needed=needed,
            release=before.restore,
        )


def _smaller_size(model: Any, noise: Tensor, free: float) -> str:
    """The largest size of this shape and batch whose forward fits in ``free`` bytes, as advice."""
    height, width = (PIXELS_PER_TOKEN * size for size in noise.shape[-2:])

    def fits(height: int, width: int) -> bool:
        grid = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
        return model.memory_required([*noise.shape[:2], *grid]) <= free

    size = largest_below(height, width, fits)
    return f"a size below {width}x{height}" if size is None else f"a size of {size[1]}x{size[0]} or less"


class _Before:
    """What a run changes of its guider, of CUDA graphs and of the random numbers; put back by ``restore``."""

    def __init__(self, guider: Any) -> None:
        self.guider, self.device = guider, guider.model_patcher.load_device
        self.conds = _copied(guider.conds)
        self.options = _cloned(guider.model_options)
        self.random = torch.get_rng_state()
        self.gpu_random = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    def restore(self) -> None:
        """The guider is as ``CFGGuider.sample`` made it, holds nothing of the run, and has no CUDA graphs:
        those read weights where they lay, and their memory is wanted."""
        guider = self.guider
        # ComfyUI itself does this after a run that succeeds: a control net lets go of its picture.
        comfy.sampler_helpers.cleanup_models(guider.conds, vars(guider).pop("loaded_models", []))
        vars(guider).pop("inner_model", None)
        guider.conds, guider.model_options = _copied(self.conds), _cloned(self.options)
        graphs = guider.model_options["transformer_options"].pop(GRAPHS, None)
        if graphs is not None:
            graphs.clear()
        torch.set_rng_state(self.random)
        if self.gpu_random is not None:
            torch.cuda.set_rng_state(self.gpu_random, self.device)


def _copied(conds: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [dict(cond) for cond in entries] for name, entries in conds.items()}


def _cloned(options: dict[str, Any]) -> dict[str, Any]:
    return comfy.model_patcher.create_model_options_clone(options)
