"""What the attention of all layers of one run shares: blocks of queries, positions, rotation, masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Memory-efficient attention wants rows of masks to begin at multiples of this many elements.
_ALIGN = 8


@dataclass(frozen=True)
class Block:
    """Consecutive queries of one prompt: tokens [start, stop) look at [first, stop) and, if ``after``, at
    the prefix before those."""

    first: int
    start: int
    stop: int
    after: bool


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys], True where row may look at column: not ahead, not ``window`` or more behind.

    The last query stands at the last key.
    """
    position = torch.arange(keys - queries, keys, device=device)
    behind = position[:, None] - torch.arange(keys, device=device)
    keep = behind >= 0
    return keep if window is None else keep & (behind < window)


class AttentionPlan:
    """``rotary`` [2, T, D / 2] fp32 at ``positions`` [T]; ``prefix`` keys stand before some of the
    ``blocks``; sliding layers see ``window`` positions.

    Masks of equal shape are one buffer whose last column each layer sets: layers run one after the other,
    so one writes it at a time.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        positions: Tensor,
        rotary: Tensor,
        prefix: int,
        window: int,
        dtype: torch.dtype,
    ) -> None:
        self.blocks, self.rotary, self.prefix, self.window = blocks, rotary, prefix, window
        self.device, self.dtype = rotary.device, dtype
        self.positions = positions.to(self.device, torch.int32)
        self._masks: dict[tuple[int, int, bool], Tensor] = {}
        self._tiles: dict[int, Tensor] = {}
        self._table: Tensor | None = None

    def mask(self, block: Block, sinks: Tensor, sliding: bool) -> Tensor:
        """Additive [heads, queries, keys + 1] for one block, ``sinks`` [heads] in the last column."""
        queries = block.stop - block.start
        keys = block.stop - block.first + (self.prefix if block.after else 0)
        name = (queries, keys, sliding)
        if name not in self._masks:
            self._masks[name] = self._empty_mask(*name, heads=len(sinks))
        mask = self._masks[name][..., : keys + 1]
        mask[..., keys] = sinks.unsqueeze(-1)
        return mask

    def tiles(self, queries: int) -> Tensor:
        """int32 [n, 4]: the blocks cut into tiles of ``queries``: first, start, stop, after."""
        if queries not in self._tiles:
            rows = [
                (block.first, start, block.stop, int(block.after))
                for block in self.blocks
                for start in range(block.start, block.stop, queries)
            ]
            self._tiles[queries] = torch.tensor(rows, dtype=torch.int32).to(self.device)
        return self._tiles[queries]

    def table(self) -> Tensor:
        """The rotation as [T, D]: a token's cosines, then its sines."""
        if self._table is None:
            self._table = torch.cat(list(self.rotary), dim=-1).contiguous()
        return self._table

    def _empty_mask(self, queries: int, keys: int, sliding: bool, heads: int) -> Tensor:
        width = -(-(keys + 1) // _ALIGN) * _ALIGN
        mask = torch.zeros(heads, queries, width, dtype=self.dtype, device=self.device)
        window = self.window if sliding else None
        mask[..., :keys].masked_fill_(~causal_mask(queries, keys, window, self.device), -math.inf)
        return mask
