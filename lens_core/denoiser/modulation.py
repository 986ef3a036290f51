"""The modulation bank: all that the denoiser computes from the noise level alone, once for every level.

The 96 ``*_mod.1`` linears are a third of the model, and their input is the time embedding. Evaluated for
all levels of a run at once they are a table of 1.8 MB a level, and the steps need them no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..kernels.block import PARTS
from .block import Tables

if TYPE_CHECKING:
    from .transformer import LensDenoiser

# Levels evaluated at once at most, 113 MB; a run with more (hundreds of steps) fills the table again.
_AT_ONCE = 64


class Modulation(NamedTuple):
    """Of B pictures: the time embedding [B, H], the blocks' tables [B, blocks, 2, 6 H] (image, text), and
    the output norm's [B, 2 H]."""

    temb: Tensor
    blocks: Tensor
    out: Tensor

    def tables(self) -> list[Tables]:
        """Each block's tables, [B, 6 H] each."""
        views = self.blocks.flatten(1, 2).unbind(1)
        return list(zip(views[::2], views[1::2], strict=True))

    def at(self, rows: list[int]) -> Modulation:
        """These rows; of one row's repetition no copy is made."""
        if len(set(rows)) == 1:
            count, first = len(rows), rows[0]
            return Modulation(*(table[first : first + 1].expand(count, *table.shape[1:]) for table in self))
        index = torch.tensor(rows, device=self.temb.device)
        return Modulation(*(table[index] for table in self))


def modulation(denoiser: LensDenoiser, sigma: Tensor, dtype: torch.dtype) -> Modulation:
    """Evaluate it for noise levels sigma [B]."""
    temb = denoiser.embed_sigma(sigma, dtype)
    blocks = denoiser.modulators(temb.device)
    shape = (len(sigma), len(blocks), 2, PARTS * denoiser.config.hidden_size)
    table = torch.empty(shape, dtype=dtype, device=temb.device)
    for index, block in enumerate(blocks):
        table[:, index, 0], table[:, index, 1] = block.tables(temb)
    return Modulation(temb, table, denoiser.norm_out.table(temb))


def modulation_bytes(denoiser: LensDenoiser) -> int:
    """What the weights weigh that only the noise level needs."""
    layers = (layer for block in denoiser.blocks for layer in (block.img_mod, block.txt_mod))
    return sum(parameter.nbytes for layer in layers for parameter in layer.parameters())


class ModulationBank:
    """Modulation by noise level: the known levels of a run together, any other on demand and kept.

    Where gradients are gathered nothing is kept: weights change between steps, and backward passes share no
    graph.
    """

    def __init__(self, levels: Iterable[float] = ()) -> None:
        """``levels`` are the noise levels that will be asked for, in that order."""
        self._planned = list(dict.fromkeys(levels))
        self._known: dict[float, tuple[Modulation, int]] = {}

    def at(self, denoiser: LensDenoiser, sigma: Tensor, dtype: torch.dtype) -> Modulation:
        """Modulation for noise levels sigma [B]; weights are touched only for a level not seen before."""
        if torch.is_grad_enabled():
            return modulation(denoiser, sigma, dtype)
        levels = sigma.tolist()
        if any(level not in self._known for level in levels):
            self._evaluate(denoiser, list(dict.fromkeys(levels)), sigma, dtype)
        found = [self._known[level] for level in levels]
        if all(table is found[0][0] for table, _ in found):
            return found[0][0].at([row for _, row in found])
        rows = [table.at([row]) for table, row in found]
        return Modulation(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def to(self, device: torch.device | str) -> ModulationBank:
        """A copy whose tables are on ``device``."""
        bank = ModulationBank(self._planned)
        moved: dict[int, Modulation] = {}
        for level, (table, row) in self._known.items():
            if id(table) not in moved:
                moved[id(table)] = Modulation(*(part.to(device) for part in table))
            bank._known[level] = (moved[id(table)], row)
        return bank

    def _evaluate(
        self, denoiser: LensDenoiser, levels: list[float], like: Tensor, dtype: torch.dtype
    ) -> None:
        """Fill a table with ``levels`` and, if they are planned, those planned after them."""
        if levels[0] in self._planned:
            ahead = self._planned[self._planned.index(levels[0]) :]
            levels = list(dict.fromkeys(levels + ahead))[: max(_AT_ONCE, len(levels))]
        if len(self._known) + len(levels) > 2 * _AT_ONCE:
            self._known.clear()
        table = modulation(denoiser, like.new_tensor(levels), dtype)
        self._known |= {level: (table, row) for row, level in enumerate(levels)}
