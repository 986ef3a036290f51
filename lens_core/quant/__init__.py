"""Packed weight formats: their plain-torch definitions and the one table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import mxfp4, nvfp4

__all__ = ["FORMATS", "PackedFormat"]

# (blocks u8 [..., N, K/32, 16], scales u8 [..., N, K/group], scale fp32 [...] or None, dtype)
# -> values [..., N, K]
Dequantize = Callable[[Tensor, Tensor, "Tensor | None", torch.dtype], Tensor]


@dataclass(frozen=True)
class PackedFormat:
    """A format of expert banks. ``group`` values share a scale byte; ``has_scale`` says whether every
    expert also has an fp32 factor."""

    name: str
    group: int
    has_scale: bool
    dequantize: Dequantize


def _dequantize_mxfp4(blocks: Tensor, scales: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is not None:
        raise ValueError("MXFP4 has no factor per expert; pass None for scale.")
    return mxfp4.dequantize(blocks, scales, dtype)


def _dequantize_nvfp4(blocks: Tensor, scales: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        raise ValueError("NVFP4 needs the fp32 factor of every expert as scale; got None.")
    return nvfp4.dequantize(blocks, scales, scale, dtype)


FORMATS: dict[str, PackedFormat] = {
    row.name: row
    for row in (
        PackedFormat("mxfp4", mxfp4.BLOCK, False, _dequantize_mxfp4),
        PackedFormat("nvfp4", nvfp4.GROUP, True, _dequantize_nvfp4),
    )
}
