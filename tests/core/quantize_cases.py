"""Quantising the tiny denoiser into a file: to its end, or until it is cancelled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lens_core.denoiser_file import DenoiserFile
from lens_core.quantize_file import quantize_file

MODE = "int8_dynamic"
TENSORS = 94  # of the tiny denoiser


class Cancel(Exception):
    """Stands for ComfyUI's."""


def part_of(target: Path) -> Path:
    """What the file is called until it is whole."""
    return target.with_name(target.name + ".part")


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """All of a tensor, to compare bits of any dtype."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, bytes(flat.numpy())


def stop_after(count: int) -> Callable[[int, int], None]:
    def on_tensor(done: int, total: int) -> None:
        if done == count:
            raise Cancel

    return on_tensor


def begin(source: DenoiserFile, target: Path, count: int, mode: str = MODE) -> None:
    """Quantise and cancel after ``count`` tensors."""
    with pytest.raises(Cancel):
        quantize_file(source, mode, target, on_tensor=stop_after(count))
    assert not target.exists()


def finish(source: DenoiserFile, target: Path, mode: str = MODE, **options: Any) -> int:
    """Quantise; returns how many tensors were already there."""
    seen: list[int] = []
    assert (
        quantize_file(source, mode, target, on_tensor=lambda done, _: seen.append(done), **options) == target
    )
    assert not part_of(target).exists()
    assert seen == list(range(seen[0], TENSORS + 1))
    return seen[0] - 1
