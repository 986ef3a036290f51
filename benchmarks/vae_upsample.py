"""Doubling pixels before a 3x3 convolution, three ways: to choose from, none is used elsewhere.

A doubled picture has only four kinds of 3x3 windows, each over 2x2 different pixels. So the convolution is
four 2x2 convolutions of the small picture, one for each position within a pixel's double, with weights summed
where two of them meet the same pixel: 16 products for 36.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def doubled(x: Tensor, weight: Tensor) -> Tensor:
    """The definition: [B, C, h, w] to [B, O, 2h, 2w] with weights [O, C, 3, 3]."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)


def folded(weight: Tensor) -> Tensor:
    """Weights [O, C, 3, 3] as those of the four positions, [4 O, C, 2, 2], summed in fp32 or wider."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    first, middle, last = wide.unbind(2)
    rows = torch.stack([first, middle + last]), torch.stack([first + middle, last])
    positions = []
    for row in rows:  # [2, O, C, 3]
        first, middle, last = row.unbind(3)
        for columns in ((first, middle + last), (first + middle, last)):
            positions.append(torch.stack(columns, -1).permute(1, 2, 0, 3))
    return torch.cat(positions).to(weight.dtype)


def at_once(x: Tensor, weight: Tensor) -> Tensor:
    """One convolution for all four positions, [4 O, C, 2, 2], and their interleaving."""
    height, width = x.shape[2:]
    every = F.conv2d(x, weight, padding=1)  # of one row and column more than a position has
    return _interleaved(
        [
            part[:, :, row : row + height, column : column + width]
            for part, (row, column) in zip(every.chunk(4, 1), _positions(), strict=True)
        ]
    )


def one_by_one(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution for each position, and their interleaving."""
    padded = F.pad(x, (1, 1, 1, 1))
    height, width = x.shape[2:]
    return _interleaved(
        [
            F.conv2d(padded[:, :, row : row + height + 1, column : column + width + 1], part)
            for part, (row, column) in zip(weight.chunk(4), _positions(), strict=True)
        ]
    )


def _positions() -> list[tuple[int, int]]:
    return [(0, 0), (0, 1), (1, 0), (1, 1)]


def _interleaved(parts: list[Tensor]) -> Tensor:
    batch, channels, height, width = parts[0].shape
    layout = torch.channels_last if parts[0].is_cuda else torch.contiguous_format
    out = parts[0].new_empty(batch, channels, 2 * height, 2 * width).contiguous(memory_format=layout)
    for part, (row, column) in zip(parts, _positions(), strict=True):
        out[:, :, row::2, column::2] = part
    return out
