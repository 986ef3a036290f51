"""Random inputs of a block's operations. Image and text differ in weights, epsilons and tables, and are so
small that the epsilons count: an operation that mixes them up is wrong by far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lens_core.kernels.block import HeadNorms, Rows

# Epsilons of image and text beside streams of about 1e-2, whose mean square is 1e-4.
SMALL, EPSILONS = 1e-2, (3e-5, 2e-4)


def bank(batch: int, hidden: int, dtype: torch.dtype, blocks: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Tables [B, 6 H] of some blocks' image and text, as views of one table like the denoiser's."""
    views = torch.randn(batch, blocks, 2, 6 * hidden).to(dtype).flatten(1, 2).unbind(1)
    return list(zip(views[::2], views[1::2], strict=True))


def rows(tokens: Sequence[int], batch: int, hidden: int, dtype: torch.dtype) -> list[Rows]:
    """Streams with updates and norms, between two blocks."""
    before, after = bank(batch, hidden, dtype)[1:]
    return [
        Rows(
            (SMALL * torch.randn(batch, count, hidden)).to(dtype),
            (SMALL * torch.randn(batch, count, hidden)).to(dtype),
            before[stream],
            torch.randn(hidden).to(dtype),
            EPSILONS[stream],
            after[stream],
        )
        for stream, count in enumerate(tokens)
    ]


def projections(
    tokens: Sequence[int], batch: int, heads: int, dtype: torch.dtype, dim: int = 64
) -> list[Tensor]:
    """[B, T, 3 H] of each stream."""
    streams = [torch.randn(batch, count, 3 * heads * dim) for count in tokens]
    for stream in streams:
        stream[..., : 2 * heads * dim] *= SMALL
    return [stream.to(dtype) for stream in streams]


def head_norms(streams: int, dtype: torch.dtype, dim: int = 64) -> list[HeadNorms]:
    """Weights of either sign from 0.5 to 1.1: no score exceeds sqrt(D) 1.21, or 14 as a power of two."""

    def weight() -> Tensor:
        return ((0.5 + 0.6 * torch.rand(dim)) * (torch.randint(0, 2, (dim,)) * 2 - 1)).to(dtype)

    return [HeadNorms(weight(), weight(), eps) for eps in EPSILONS[:streams]]


def angles(tokens: Sequence[int], dim: int = 64) -> tuple[Tensor, Tensor]:
    """Angles [sum T, D / 2] in fp64, and their rotation table in fp32."""
    angle = 100 * torch.randn(sum(tokens), dim // 2, dtype=torch.float64)
    return angle, torch.stack([angle.cos(), angle.sin()]).float()
