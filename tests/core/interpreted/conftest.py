"""Triton's interpreter must be chosen before Triton is imported, so these tests need a process of their own:
``tests/core/test_triton_kernels.py`` starts one per file. By hand:
``TRITON_INTERPRET=1 pytest tests/core/interpreted``."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def poison_of(dtype: torch.dtype) -> float:
    """NaN, the smallest integer, or 171 of bytes: what no kernel is expected to write."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min if dtype.is_signed else 171


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch):
    """New memory is NaN, or a number that is no index: what a kernel forgets to write shows."""

    def poisoned(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(poison_of(tensor.dtype))

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


class Fences:
    """Tensors between marked memory. The marks are NaNs of 63 kinds: what is read there shows in a result,
    and what is written there shows in them."""

    WIDTH = 8192

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(1)
        self._kept: list[tuple[Tensor, Tensor, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A new one, itself full of marks."""
        size = math.prod(shape) * dtype.itemsize // 2
        length = size + 2 * self.WIDTH
        memory = torch.randint(0x7FC1, 0x8000, (length,), generator=self._generator, dtype=torch.int16)
        self._kept.append((memory, memory.clone(), size))
        return memory[self.WIDTH : self.WIDTH + size].view(dtype).view(shape)

    def around(self, x: Tensor) -> Tensor:
        """A contiguous copy of x."""
        return self.empty(*x.shape, dtype=x.dtype).copy_(x)

    def assert_intact(self) -> None:
        """Nothing was written but into the tensors."""
        for memory, before, size in self._kept:
            assert torch.equal(memory[: self.WIDTH], before[: self.WIDTH]), "written before a tensor"
            end = self.WIDTH + size
            assert torch.equal(memory[end:], before[end:]), "written behind a tensor"


@pytest.fixture
def fences(_poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> Fences:
    """Fences that all new 16-bit memory is made in, too."""
    fences, like, new = Fences(), torch.empty_like, Tensor.new_empty

    def empty_like(x: Tensor) -> Tensor:
        return fences.empty(*x.shape, dtype=x.dtype) if x.dtype.itemsize == 2 else like(x)

    def new_empty(x: Tensor, *shape: int, **options) -> Tensor:
        if x.dtype.itemsize == 2 and not options and math.prod(shape):
            return fences.empty(*shape, dtype=x.dtype)
        return new(x, *shape, **options)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    return fences
