"""Denoisers that the graph swapped for others, kept in RAM for the swap back.

ComfyUI forgets a loader's output once the loader has other inputs, and each swap of Turbo, RL and Base would
read and quantise anew. So every MODEL from LensModelLoader is a clone and holds, as an attachment, the shelf
with the patchers that those MODELs are clones of. Nobody else does: with the last MODEL (the loader removed,
ComfyUI's cache emptied) all of it goes. The patchers hold no shelf, so there is no cycle.

ComfyUI forgets the old MODEL before the loader gives the new one: after the first node of a prompt, with its
classic cache before that. Earlier still it asks for fingerprints; from there to its end the prompt holds the
shelf, in a context variable, which dies with the prompt's task.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakSet

import comfy.model_management
import torch

from ...lens_core.config import Variant
from ...lens_core.memory import available_ram
from . import paths
from .model import load_model
from .residency import patcher_class

log = logging.getLogger(__name__)
_ATTACHMENT = "lens_shelf"
_LEAST_RESERVE, _MOST_RESERVE = 4e9, 16e9


class Key(NamedTuple):
    """All that decides what a denoiser is once it is loaded."""

    name: str | None
    file: str
    dtype: torch.dtype | None
    quantization: str
    host: tuple[Any, ...]

    def __str__(self) -> str:
        name = (self.name or "").removesuffix(".safetensors")
        return name if self.quantization == "none" else f"{name} ({self.quantization})"


class Shelf:
    """Patchers by key, the least recently used first."""

    def __init__(self) -> None:
        self._denoisers: OrderedDict[Key, tuple[Any, Variant]] = OrderedDict()

    def take(self, key: Key) -> tuple[Any, Variant] | None:
        """The patcher of a key, and its variant, if they are here; from now on the last used."""
        if key in self._denoisers:
            self._denoisers.move_to_end(key)
            log.info("Lens: %s is still in RAM: not read again.", key)
        return self._denoisers.get(key)

    def key_of(self, model: Any) -> Key | None:
        """The key of what a MODEL is a clone of, if that is still here."""
        return next((key for key, (patcher, _) in self._denoisers.items() if model.is_clone(patcher)), None)

    def put(self, key: Key, patcher: Any, variant: Variant) -> None:
        """Keep what was loaded, instead of what its file held before."""
        for other in [
            other for other in self._denoisers if other.name == key.name and other.file != key.file
        ]:
            del self._denoisers[other]
        self._denoisers[key] = (patcher, variant)

    def make_room(self, key: Key, needed: int = 0) -> None:
        """Let go of the least recently used, but never of ``key``, until RAM holds ``needed`` bytes more.

        What the graph still uses goes with the graph, so the bytes of each count as free from here on.
        """
        wanted = needed + _reserve() + sum(_returning(patcher) for patcher, _ in self._denoisers.values())
        available = available_ram()
        missing = wanted - available
        for other in [other for other in self._denoisers if other != key]:
            patcher, _ = self._denoisers[other]
            if _stays_on_gpu(patcher):
                log.info("Lens: %s is not kept: ComfyUI's start flags keep models on the GPU.", other)
            elif missing > 0:
                log.info(
                    "Lens: %s is not kept in RAM for a swap back: %.1f GB are available, and %.1f should be.",
                    other,
                    available / 1e9,
                    wanted / 1e9,
                )
            else:
                continue
            missing -= patcher.model_size()
            del self._denoisers[other]


# At most one, and not held by this.
_living: WeakSet[Shelf] = WeakSet()
_of_prompt: ContextVar[Shelf | None] = ContextVar("lens_shelf", default=None)


def hold(name: str | None, dtype: torch.dtype | None, quantization: str) -> None:
    """For the prompt that begins: keep the shelf until the loader runs, less what RAM lacks the room for."""
    shelf = next(iter(_living), None)
    _of_prompt.set(shelf)
    if shelf is not None:
        shelf.make_room(_key(name, dtype, quantization))


def shelved_model(name: str, dtype: torch.dtype | None, quantization: str) -> tuple[Any, Variant]:
    """``load_model`` of an option, from RAM if it is there; the MODEL keeps what else was loaded in RAM."""
    path = paths.path_of("denoiser", name)
    key = _key(name, dtype, quantization)
    shelf = next(iter(_living), None) or Shelf()
    found = shelf.take(key)
    if found is None:
        shelf.make_room(key, paths.size("denoiser", name))
        found = load_model(path, dtype, quantization)
        shelf.put(key, *found)
    shelf.make_room(key)
    patcher, variant = found
    model = patcher.clone()
    model.attachments[_ATTACHMENT] = shelf
    _living.add(shelf)
    _of_prompt.set(None)
    return model, variant


def plain_clone(model: Any) -> Any:
    """A clone out of dynamic VRAM, where each is a model of its own: from RAM if it was made before."""
    shelf = model.attachments.get(_ATTACHMENT)
    dynamic = None if shelf is None or not model.is_dynamic() else shelf.key_of(model)
    if dynamic is None:
        return model.clone(disable_dynamic=True)
    key = dynamic._replace(host=(*dynamic.host[:-1], patcher_class(disable_dynamic=True)))
    found = shelf.take(key)
    if found is None:
        shelf.make_room(key, model.model_size())
        load, (path, dtype, quantization), _ = model.cached_patcher_init
        found = load(path, dtype, quantization, disable_dynamic=True)
        shelf.put(key, *found)
    clone = model.clone(disable_dynamic=True, model_override=found[0].get_clone_model_override())
    clone.parent = found[0]  # whom ComfyUI asks about these weights once the clone is gone
    return clone


def _key(name: str | None, dtype: torch.dtype | None, quantization: str) -> Key:
    management = comfy.model_management
    host = (management.get_torch_device(), management.unet_offload_device(), patcher_class())
    return Key(name, paths.stamp("denoiser", name), dtype, quantization, host)


def _reserve() -> float:
    """Bytes to leave free: for the encoder (13 GB), read when a prompt first needs it, and other programs."""
    return min(max(_LEAST_RESERVE, comfy.model_management.total_ram * 2**20 / 4), _MOST_RESERVE)


def _returning(patcher: Any) -> int:
    """Bytes that will be in RAM again once ComfyUI takes the model off the GPU."""
    if patcher.is_dynamic() or patcher.load_device == patcher.offload_device:
        return 0
    return int(patcher.loaded_size())


def _stays_on_gpu(patcher: Any) -> bool:
    """Whether the host would never take it off the GPU (--highvram, --gpu-only)."""
    return not comfy.model_management.is_device_cpu(patcher.offload_device)
