"""A GPU of a chosen size for ComfyUI's memory manager, on a machine without one.

The layer store takes ``cpu:0`` for another device than ``cpu``, where the masters lie, so layers are made
resident and streamed as on a GPU. What is used is counted from the tensors of the resident layers, not
from what our patcher says.

The denoiser's weights ComfyUI moves by itself, and PyTorch calls the two devices one: a move copies nothing
and leaves no trace on a tensor. Moves of modules are noted instead.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

GPU = torch.device("cpu:0")
CPU = torch.device("cpu")
_MOVE = torch.nn.Module.to


def resident_bytes(patcher: Any) -> int:
    """Bytes of all memory that an encoder's resident layers hold, each piece once."""
    layers = patcher.model.text.layers._resident.values()
    pieces = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in layers
        for tensor in layer.state_dict().values()
    }
    return sum(pieces.values())


def own_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's tensors, without those of the modules inside."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(tensor.nbytes for tensor in tensors)


class FakeGpu:
    """``capacity`` bytes, of which ``taken`` are other programs'. ``encoders`` are counted, and ``here``,
    the modules that were moved to it."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.taken = capacity, 0.0
        self.encoders: list[Any] = []
        self.here: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()

    def move(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """In place of Module.to, which it calls: notes where to."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        for inner in module.modules() if device is not None else ():
            self.here.pop(inner, None)
            if device == GPU:
                self.here[inner] = True
        return _MOVE(module, *args, **kwargs)

    def free(self, device: torch.device | None = None, torch_free_too: bool = False) -> Any:
        """In place of ComfyUI's get_free_memory."""
        if device == CPU:
            return (1 << 40, 1 << 40) if torch_free_too else 1 << 40
        models = {id(patcher.model): patcher for patcher in self.encoders}
        used = sum(map(resident_bytes, models.values())) + sum(map(own_bytes, self.here))
        left = self.capacity - self.taken - used
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
        monkeypatch.setattr(torch.nn.Module, "to", lambda *args, **kwargs: self.move(*args, **kwargs))
        return self


def use_dynamic_patchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's dynamic patcher, as on CUDA, with an empty address space."""
    import comfy.model_patcher
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar

    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", NoHostBuffer)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", AddressSpace)
    patchers = comfy.model_patcher
    monkeypatch.setattr(patchers, "CoreModelPatcher", patchers.ModelPatcherDynamic)


class NoHostBuffer:
    """In place of comfy-aimdo's page-locked memory: none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.size = 0


class AddressSpace:
    """In place of comfy-aimdo's, which hands out places upwards and frees the highest first. Empty."""

    def __init__(self, size: int, device: int) -> None:
        self.end = 0

    def alloc(self, size: int) -> tuple[AddressSpace, int, int]:
        place = (self, self.end, size)
        self.end += size
        return place

    def prioritize(self) -> None:
        pass

    def loaded_size(self) -> int:
        return 0

    def free_memory(self, size: int) -> int:
        return 0
