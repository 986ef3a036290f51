"""A layer's tensors in one piece of memory: one allocation, one copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Tensors begin at multiples of this, as CUDA's own allocations do.
_ALIGN = 256


@dataclass(frozen=True)
class Layout:
    """Names with offset, shape and dtype, and the bytes of the whole."""

    entries: tuple[tuple[str, int, torch.Size, torch.dtype], ...]
    size: int

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """The layout of a module's tensors: all weights in the module's order, all biases, and so on, so
        that matrices which are applied to the same input lie one behind the other."""
        entries, offset = [], 0
        state = module.state_dict()
        for name in sorted(state, key=lambda name: name.rpartition(".")[2]):
            tensor = state[name]
            entries.append((name, offset, tensor.shape, tensor.dtype))
            offset += -(-tensor.nbytes // _ALIGN) * _ALIGN
        return cls(tuple(entries), offset)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors inside ``flat`` (u8, at least ``size`` long)."""
        return {
            name: flat[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, offset, shape, dtype in self.entries
        }


def assign(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Put ``tensors`` into a module in place of its own."""
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()
