"""Page-locked memory, from which a GPU copies at full speed while it computes.

Registered by hand: PyTorch's own pinned allocator rounds up to powers of two and never gives back.
"""

from __future__ import annotations

import weakref

import psutil
import torch
from torch import Tensor


def available_ram() -> int:
    """Bytes that programs can get without swapping."""
    return psutil.virtual_memory().available


def pinned(size: int) -> Tensor | None:
    """A u8 tensor of ``size`` page-locked bytes, unlocked when it goes; None where the system refuses."""
    flat = torch.empty(size, dtype=torch.uint8)
    address = flat.data_ptr()
    if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) != 0:
        return None
    storage = flat.untyped_storage()
    weakref.finalize(storage, torch.cuda.cudart().cudaHostUnregister, address).atexit = False
    return flat
