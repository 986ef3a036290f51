"""Which of the denoiser's weights ComfyUI gives GPU memory to last, and takes it from first.

Those of the modulation: a third of all, used once before a run's first step (see ``run``), while every step
needs all the others. ComfyUI takes the largest modules first, and the largest are these; hence its two
patchers with only that order changed.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ...lens_core.config import is_modulation


class _ModulationLast:
    """What both patchers share: the list that ComfyUI sorts, loads from and frees from."""

    def _load_list(
        self, for_dynamic: bool = False, default_device: torch.device | None = None
    ) -> list[tuple[Any, ...]]:
        """ComfyUI's list of (sort key, ..., name, module, parameters), its key replaced for the modulation.

        The dynamic patcher sorts upwards, by False or True for small and large modules, then by size; the
        first get the low addresses, which are freed last. The other loads downwards and frees upwards, by
        bytes that it also keeps free for streaming that module: none, as no step streams these (room for the
        modules after it is kept all the same). What a module holds is counted from another field.
        """
        last = 2 if for_dynamic else 0
        entries = super()._load_list(for_dynamic, default_device)
        return [(last, *entry[1:]) if is_modulation(entry[-3]) else entry for entry in entries]


class LensPatcher(_ModulationLast, comfy.model_patcher.ModelPatcher):
    """Without dynamic VRAM."""

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """As ModelPatcher's. While the model is streamed (see ``recovery``) nothing stays on the GPU,
        whatever ComfyUI offers: on other GPUs than NVIDIA's, at least two fifths of the free memory."""
        if self.model.streamed and not comfy.model_management.is_device_cpu(device_to):
            lowvram_model_memory, full_load = 0.1, False  # as ComfyUI writes "none"; 0 is "all"
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)


class DynamicLensPatcher(_ModulationLast, comfy.model_patcher.ModelPatcherDynamic):
    """With dynamic VRAM; on a CPU, where ComfyUI's own gives way to the other, so does this one."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _ours(super().__new__(cls, *args, **kwargs))

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """As ModelPatcher's; with ``disable_dynamic`` a LensPatcher."""
        return _ours(super().clone(*args, **kwargs))


def _ours(patcher: Any) -> Any:
    """The patcher, made a LensPatcher if it is ComfyUI's plain one: where a dynamic one will not do, ComfyUI
    names that class itself. A LensPatcher is the same object but for one method."""
    if type(patcher) is comfy.model_patcher.ModelPatcher:
        patcher.__class__ = LensPatcher
    return patcher


def patcher_class(disable_dynamic: bool = False) -> type[comfy.model_patcher.ModelPatcher]:
    """Ours in place of the patcher that ComfyUI would use."""
    host = comfy.model_patcher.CoreModelPatcher
    dynamic = issubclass(host, comfy.model_patcher.ModelPatcherDynamic)
    return DynamicLensPatcher if dynamic and not disable_dynamic else LensPatcher
