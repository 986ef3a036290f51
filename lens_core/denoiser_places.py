"""Where the denoiser's weights lie: resident, or streamed block by block; the modulation's last of all.

Three stores. What every block shares and all small tensors (``rest``) are on the GPU whenever the denoiser
works; the blocks' projections are resident as far as the plan says and streamed beyond; the modulation's
linears, a third of all weights, are needed once before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import nn

from .config import is_modulation
from .denoiser import LensDenoiser
from .denoiser.block import LensBlock
from .memory.in_place import InPlaceStore
from .quantized import QuantizedLinear


class DenoiserPlaces:
    """Places the weights of a denoiser that lies in RAM, and hands its blocks out where they are needed."""

    def __init__(self, denoiser: LensDenoiser) -> None:
        blocks = list(denoiser.blocks)
        projections = [_linears(block, modulation=False) for block in blocks]
        modulation = [_linears(block, modulation=True) for block in blocks]
        taken = {layer for group in (*projections, *modulation) for layer in group}
        self.rest = InPlaceStore([[module for module in denoiser.modules() if module not in taken]])
        self.steps, self.modulation = InPlaceStore(projections), InPlaceStore(modulation)
        self._blocks = blocks
        denoiser.places = self

    @property
    def stores(self) -> tuple[InPlaceStore, InPlaceStore, InPlaceStore]:
        """In the order in which they get memory."""
        return self.rest, self.steps, self.modulation

    @property
    def loaded(self) -> int:
        """Bytes on the GPU between runs."""
        return sum(store.loaded for store in self.stores)

    def load(self, device: torch.device, blocks: int, modulation: bool) -> None:
        """Make this many blocks resident, and the modulation or not; what is beyond leaves."""
        wanted = (1, blocks, len(self._blocks) if modulation else 0)
        for store, count in zip(self.stores, wanted, strict=True):
            store.keep(device, count)

    def unload(self) -> None:
        """Leave the GPU; the masters never left RAM, so nothing is copied."""
        for store in self.stores:
            store.unload()

    def ready(self, device: torch.device) -> Sequence[LensBlock]:
        """The blocks for a step, each valid until the next is asked for."""
        return self._visiting(self.steps, device)

    def modulators(self, device: torch.device) -> Sequence[LensBlock]:
        """The blocks for their modulation."""
        return self._visiting(self.modulation, device)

    def _visiting(self, store: InPlaceStore, device: torch.device) -> Sequence[LensBlock]:
        if store.device is None or store.whole:
            return self._blocks
        return _Visits(self._blocks, store, device, range(len(self._blocks)))


class _Visits(Sequence[LensBlock]):
    """Some blocks in a row; going through them brings each one's weights in its turn."""

    def __init__(
        self, blocks: Sequence[LensBlock], store: InPlaceStore, device: torch.device, indices: range
    ) -> None:
        self._blocks, self._store, self._device, self._indices = blocks, store, device, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[LensBlock]:
        return (self._blocks[index] for index in self._store.visits(self._device, self._indices))

    @overload
    def __getitem__(self, which: int) -> LensBlock: ...
    @overload
    def __getitem__(self, which: slice) -> _Visits: ...
    def __getitem__(self, which: int | slice) -> LensBlock | _Visits:
        if isinstance(which, int):
            return self._blocks[self._indices[which]]
        return _Visits(self._blocks, self._store, self._device, self._indices[which])


def _linears(block: LensBlock, *, modulation: bool) -> list[nn.Module]:
    """A block's linears, those of its modulation or the others."""
    return [
        module
        for name, module in block.named_modules(prefix="block")
        if isinstance(module, (nn.Linear, QuantizedLinear)) and is_modulation(name) == modulation
    ]
