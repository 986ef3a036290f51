"""Prompts without padding: which token of a packed batch stands where, and what it may look at.

Every prompt's chat text begins with the same prefix, and attention is causal, so the prefix's keys and
values are computed once and serve all prompts. A batch is each prompt's own tokens laid end to end, with
positions that go on where the prefix ends; the prefix itself is a batch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Block

# Queries of one attention call: a very long prompt's mask stays within some dozen MB.
_QUERIES = 512


@dataclass(frozen=True)
class Packing:
    """A packed batch: token ids and absolute positions [T], the attention's blocks, tokens per prompt."""

    ids: Tensor
    positions: Tensor
    blocks: tuple[Block, ...]
    lengths: tuple[int, ...]

    def unpack(self, x: Tensor) -> list[Tensor]:
        """[T, ...] -> one tensor per prompt."""
        return list(x.split(list(self.lengths)))


def pack(tails: Sequence[Sequence[int]], after: int) -> Packing:
    """Lay ``tails`` end to end, each one the tokens that follow ``after`` tokens of a common prefix."""
    ids: list[int] = []
    positions: list[int] = []
    blocks: list[Block] = []
    for tail in tails:
        first = len(ids)
        ids.extend(tail)
        positions.extend(range(after, after + len(tail)))
        for start in range(first, len(ids), _QUERIES):
            blocks.append(Block(first, start, min(start + _QUERIES, len(ids)), after > 0))
    lengths = tuple(len(tail) for tail in tails)
    return Packing(torch.tensor(ids), torch.tensor(positions), tuple(blocks), lengths)
