"""Layers that stay the same objects wherever their tensors lie, for a model that knows its layers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import LOCKED_A_LOAD, LayerStore


class Seats(nn.Module):
    """The places of some modules' own parameters and buffers, and what was in them at first."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self._seats: dict[str, tuple[dict[str, Any], str]] = {}
        self._home: dict[str, Tensor] = {}
        for index, module in enumerate(modules):
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        self._seats[f"{index}.{name}"], self._home[f"{index}.{name}"] = (table, name), tensor

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        """The tensors of the beginning, by seat."""
        return self._home

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Seat these."""
        for name, tensor in tensors.items():
            table, key = self._seats[name]
            kept = isinstance(self._home[name], nn.Parameter)
            table[key] = nn.Parameter(tensor, requires_grad=False) if kept else tensor

    def restore(self) -> None:
        """Seat those of the beginning."""
        for name, (table, key) in self._seats.items():
            table[key] = self._home[name]


class InPlaceStore(LayerStore):
    """A ``LayerStore`` whose layers are lists of modules, each used where it is, with its tensors exchanged.

    The masters are the tensors that the modules hold now. ``on`` seats each layer's tensors in turn; what it
    yields is of no use but to know when.
    """

    masters: Sequence[Seats]

    def __init__(self, layers: Sequence[Iterable[nn.Module]]) -> None:
        super().__init__([Seats(modules) for modules in layers], nn.Module)

    @property
    def whole(self) -> bool:
        """Whether every layer is on the GPU."""
        return len(self._resident) == len(self.masters)

    def keep(self, device: torch.device, count: int) -> None:
        """Have exactly the first ``count`` layers on the GPU."""
        device, self._to_lock = self._moved_to(device), LOCKED_A_LOAD
        for index in sorted(self._resident, reverse=True)[: max(0, len(self._resident) - count)]:
            self._release(index)
        for index in range(count):
            if index not in self._resident:
                self._place(index, device)

    def visits(self, device: torch.device, indices: Sequence[int]) -> Iterator[int]:
        """Of these layers, in order: each is ready on ``device`` until the next is asked for."""
        for index, _ in zip(indices, self._run(self._moved_to(device), indices), strict=True):
            yield index

    def _seated(self, index: int, tensors: dict[str, Tensor], shell: Callable[[], nn.Module]) -> nn.Module:
        self.masters[index].put(tensors)
        return self.masters[index]

    def _left(self, index: int) -> None:
        self.masters[index].restore()
