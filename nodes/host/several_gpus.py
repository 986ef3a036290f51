"""A run on several GPUs by ComfyUI's MultiGPU CFG Split: prompt and negative at the same time.

ComfyUI gives each further GPU a copy of the network (``multigpu`` among a MODEL's additional models), which
it keeps equal to the MODEL's own before each run, and each GPU a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.patcher_extension

log = logging.getLogger(__name__)
_KEY = "multigpu"


def copies_of(patcher: Any) -> list[Any]:
    """The patchers of a MODEL's copies on further GPUs; of most MODELs none."""
    return list(patcher.get_additional_models_with_key(_KEY))


def own_parents(patcher: Any) -> None:
    """Let no copy of this MODEL, or of its clones, have the MODEL for its ``parent``.

    That is whom ComfyUI asks about the weights once a clone is gone, and a copy has other weights. Besides
    the two would hold each other: at the collector's time they go without ComfyUI hearing of it, and it takes
    a network that our shelf still holds for leaked, which its MultiGPU node then fails over.
    """
    kinds = comfy.patcher_extension.CallbacksMP
    patcher.add_callback_with_key(kinds.ON_DEEPCLONE_MULTIGPU, "lens", _root_of_its_own)
    patcher.add_callback_with_key(kinds.ON_MATCH_MULTIGPU_CLONES, "lens", _root_of_the_one_before)


def _root_of_its_own(_: Any, copy: Any) -> None:
    root = copy.clone()
    root.parent, copy.parent = None, root


def _root_of_the_one_before(patcher: Any, copy: Any) -> None:
    """ComfyUI makes ``copy`` in place of the one with the same network, whose root lives on in it."""
    root = next(before for before in copies_of(patcher) if before.model is copy.model)
    while root.parent is not None:
        root = root.parent
    copy.parent = root


@contextmanager
def on_as_many_as_can_be(patcher: Any) -> Iterator[None]:
    """Around a run of a MODEL: without its copies where those would not compute what it does, said once."""
    copies = copies_of(patcher)
    reason = _why_one(patcher) if copies else None
    if reason is None:
        yield
        return
    log.warning("Lens: this run is on one GPU: %s, and ComfyUI does that on the first alone.", reason)
    patcher.set_additional_models(_KEY, [])
    try:
        yield
    finally:
        patcher.set_additional_models(_KEY, copies)


def _why_one(patcher: Any) -> str | None:
    """What nodes have put between the layers of the MODEL's own network, which the copies share or lack."""
    if patcher.injections:
        return "a node changes how its layers compute (a LoRA in bypass mode does)"
    if any(name.startswith("diffusion_model.") for name in patcher.object_patches):
        return "a node has replaced some of its layers"
    if "torch_compile_kwargs" in patcher.model_options:
        return "it is compiled"
    return None


@contextmanager
def all_done(model_options: dict[str, Any]) -> Iterator[None]:
    """Around a run's steps: an error leaves only when no GPU computes any more.

    ComfyUI raises the first GPU's error at once and waits for the others' threads for 5 s at most, while
    whoever catches it (see ``recovery``) moves the weights that they compute with.
    """
    try:
        yield
    except Exception:
        pool = model_options.get("multigpu_thread_pool")
        for device in () if pool is None else pool.devices:
            # A thread has one task at a time: its result, or this one's after it, says that it is idle.
            pool.submit(device, _nothing)
            pool.get_result(device)
        raise


def _nothing() -> None:
    pass
