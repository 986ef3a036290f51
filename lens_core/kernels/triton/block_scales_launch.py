"""``block_scales``' kernel under the signature of its definition; limits: 2^31 numbers, whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...quant.block_scales import TILE_ROWS
from ...quant.linear import Packed
from . import block_scales
from .launcher import cdiv, launch

# As in ``linear_launch``: 32 numbers a thread, pieces as wide as its.
_NUMBERS, _WARPS = 4096, 4
_LONGEST_PIECE = 512


def unpack(weights: Sequence[Packed], dtype: torch.dtype) -> list[Tensor]:
    """See ``kernels.linear.unpack``; weights alike in format, mxfp8 or nvfp4, and size."""
    form, values, scale, _ = weights[0]
    rows, columns = values.shape[0], values.shape[1] * 8 // form.bits
    options = _options(columns, scale.shape[1], form.group, form.bits == 4)
    out = [torch.empty(rows, columns, dtype=dtype, device=values.device) for _ in weights]
    img, txt = (
        (
            packed.values.view(torch.uint8),
            packed.scale.view(torch.uint8),
            packed.scale.view(torch.uint8) if packed.zero is None else packed.zero,
            result,
        )
        for packed, result in ((weights[0], out[0]), (weights[-1], out[-1]))
    )
    # Of every tile of scales, and so of its rows, even where the weight has fewer.
    pieces = cdiv(rows, TILE_ROWS) * TILE_ROWS * (columns // options["WIDTH"])
    grid = (cdiv(pieces, options["CHUNKS"]), len(weights))
    launch(block_scales.unpack, grid, (*img, *txt, rows), options, _WARPS)
    return out


@cache
def _options(columns: int, scales: int, group: int, float4: bool) -> dict[str, int]:
    """Constants of ``block_scales.unpack``: pieces of a row of a power of two."""
    width = min(columns & -columns, _LONGEST_PIECE)
    return {
        "K": columns,
        "C": scales,
        "GROUP": group,
        "FLOAT4": float4,
        "WIDTH": width,
        "CHUNKS": _NUMBERS // width,
    }
