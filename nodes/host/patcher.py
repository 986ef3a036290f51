"""ComfyUI's memory calls for the text encoder, answered layer by layer.

The host says how many bytes the encoder may hold on the GPU; the layer store makes whole layers resident
up to there and streams the others while encoding. Taking layers off the GPU copies nothing: their master
copies never leave RAM, so what the host frees is free at once.

Never a dynamic-VRAM patcher: that would fault in weights one by one, where a layer is one copy.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ...lens_core.errors import SettingError
from .progress import loading, on_progress

log = logging.getLogger(__name__)
_CPU = torch.device("cpu")


def _to_gpu(done: int, total: int) -> str:
    return f"Text encoder to the GPU: layer {done}/{total}"


class EncoderPatcher(comfy.model_patcher.ModelPatcher):
    """ModelPatcher over a module with ``text`` (a TextEncoder) and ``placement``."""

    _said = False

    def model_size(self) -> int:
        """Bytes with every layer on the GPU, and lm_head while it is there; the embedding never is."""
        return self.model.text.total + self.model.text.beside

    def loaded_size(self) -> int:
        """Bytes on the device now; all of them once loaded where that is the CPU."""
        text = self.model.text
        return self.model_size() if self.model.on_cpu else text.layers.loaded + text.beside

    def add_patches(self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        """Packed weights take no patches, and no LoRA for Lens' encoder exists; said once per patcher,
        for merging nodes patch each weight in a call of its own."""
        if patches and not self._said:
            log.warning(
                "Changes to the text encoder (by a LoRA or a merge) are ignored: its weights are packed."
            )
            self._said = True
        return []

    def add_hook_patches(
        self, hook: Any, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list:
        """As ``add_patches``: a hook would write into the master copies."""
        return self.add_patches(patches)

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Make as many layers resident as ``lowvram_model_memory`` bytes hold; all if ``full_load``."""
        text, device = self.model.text, torch.device(device_to)
        text.read(on_progress(loading(text.file.checkpoint)), device)
        self.model.device = device
        self.model.on_cpu = device == _CPU
        if self.model.on_cpu:
            text.unload()  # a clone may have been on a GPU
            return
        try:
            budget = self._budget(math.inf if full_load else lowvram_model_memory)
            text.load(device, budget, on_progress(_to_gpu))
        except BaseException:  # Cancel is one; nothing half loaded may stay that the host does not count
            self.unpatch_model(self.offload_device)
            raise

    def _budget(self, offered: float) -> float:
        placement = self.model.placement
        if placement == "stream":
            return 0
        budget = math.inf if placement == "gpu" else offered
        if self.model.text.dense and budget < self.model_size():
            raise SettingError(
                f"The encoder's experts in bfloat16 need {self.model_size() / 1e9:.1f} GB of GPU memory and "
                f"{max(offered, 0) / 1e9:.1f} GB are free. Set LensEncoderLoader's experts to 'packed'."
            )
        return budget

    def patch_model(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        load_weights: bool = True,
        force_patch_weights: bool = False,
    ) -> Any:
        """As ModelPatcher's: 0 means no limit."""
        if load_weights:
            target = self.load_device if device_to is None else device_to
            self.load(target, lowvram_model_memory, full_load=lowvram_model_memory == 0)
        return self.model

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Use ``extra_memory`` bytes more, or fewer where negative; returns the bytes added."""
        before = self.loaded_size()
        moves = self.model.on_cpu and device_to != _CPU  # what a clone had there is no room on a GPU
        fixed = self.model.placement == "gpu" or self.model.text.dense
        if extra_memory < 0 and not (moves or fixed):
            self.model.text.unload(-extra_memory)
        else:
            self.load(device_to, (0 if moves else before) + extra_memory)
        return self.loaded_size() - before

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Free at least ``memory_to_free`` bytes, in whole layers; returns the bytes freed."""
        return self.model.text.unload(memory_to_free)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Leave the GPU."""
        if unpatch_weights:
            self.model.text.unload()
            self.model.on_cpu = False
            self.model.device = self.offload_device if device_to is None else device_to
