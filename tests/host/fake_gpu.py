"""A GPU of a chosen size for ComfyUI's memory manager, on a machine without one.

The layer store takes ``cpu:0`` for another device than ``cpu``, where the masters lie, so layers are made
resident and streamed as on a GPU. What is used is counted from the tensors of the resident layers, not
from what our patcher says.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

GPU = torch.device("cpu:0")
CPU = torch.device("cpu")


def resident_bytes(patcher: Any) -> int:
    """Bytes of all memory that an encoder's resident layers hold, each piece once."""
    layers = patcher.model.text.layers._resident.values()
    pieces = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in layers
        for tensor in layer.state_dict().values()
    }
    return sum(pieces.values())


class FakeGpu:
    """``capacity`` bytes, of which ``taken`` are other programs'. ``encoders`` are counted."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.taken = capacity, 0.0
        self.encoders: list[Any] = []

    def free(self, device: torch.device | None = None, torch_free_too: bool = False) -> Any:
        """In place of ComfyUI's get_free_memory."""
        if device == CPU:
            return (1 << 40, 1 << 40) if torch_free_too else 1 << 40
        models = {id(patcher.model): patcher for patcher in self.encoders}
        left = self.capacity - self.taken - sum(map(resident_bytes, models.values()))
        return (left, 0) if torch_free_too else left

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
        """Make ComfyUI's memory manager see it. Nothing is kept back for anything but the encoder."""
        import comfy.model_management as management

        replaced = {
            "get_free_memory": self.free,
            "is_device_cpu": lambda device: device == CPU,
            "should_use_bf16": lambda *_, **__: False,
            "text_encoder_device": lambda: GPU,
            "get_torch_device": lambda: GPU,
            "minimum_inference_memory": lambda: 0,
            "extra_reserved_memory": lambda: 0,
            "MIN_WEIGHT_MEMORY_RATIO": 0.0,
            "vram_state": management.VRAMState.NORMAL_VRAM,
            "lowvram_available": True,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(management, name, value)
        return self
