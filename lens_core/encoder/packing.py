"""Prompts without padding: which token of a packed batch stands where, and what it may look at.

Every prompt's chat text begins with the same prefix, and attention is causal, so the prefix's keys and
values are computed once and serve all prompts. Tokens of one batch are laid end to end: the prefix first
if its keys and values are not known yet, then each prompt's own tokens, whose positions go on where the
prefix ends.
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
    """A packed batch: token ids and absolute positions [T], and the attention's blocks.

    ``prefix`` counts the constant prefix's tokens; ``cold`` says that they lead this batch.
    """

    ids: Tensor
    positions: Tensor
    blocks: tuple[Block, ...]
    lengths: tuple[int, ...]
    prefix: int
    cold: bool

    def unpack(self, x: Tensor) -> list[Tensor]:
        """[T, ...] -> one tensor per prompt, without the prefix."""
        own = x[self.prefix :] if self.cold else x
        return list(own.split(list(self.lengths)))


def pack(prefix: Sequence[int], tails: Sequence[Sequence[int]], cold: bool) -> Packing:
    """Lay ``tails`` (each prompt's tokens after ``prefix``) end to end, the prefix first where ``cold``."""
    ids: list[int] = []
    positions: list[int] = []
    blocks: list[Block] = []

    def add(tokens: Sequence[int], position: int, after: bool) -> None:
        first = len(ids)
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        for start in range(first, len(ids), _QUERIES):
            blocks.append(Block(first, start, min(start + _QUERIES, len(ids)), after))

    if cold:
        add(prefix, 0, after=False)
    for tail in tails:
        add(tail, len(prefix), after=len(prefix) > 0)
    lengths = tuple(len(tail) for tail in tails)
    return Packing(torch.tensor(ids), torch.tensor(positions), tuple(blocks), lengths, len(prefix), cold)
