"""Layers that are larger together than the GPU has room for: some resident, the others streamed.

The master copy of every layer stays in RAM, usually mapped from the file, and is never changed. So
putting a layer on the GPU is a copy, taking it off is letting go, and nothing is ever copied back.

A run takes layers in order. Those not resident pass through two buffers on the GPU: while one computes,
the next is copied into the other, from page-locked memory where the system grants it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .flat import Layout, assign
from .pinned import available_ram, pinned
from .plan import BUFFERS

log = logging.getLogger(__name__)

OnLayer = Callable[[int, int], None]
# RAM that page-locked copies leave to everything else.
_RAM_RESERVE = 4 << 30
# Of layers that come back, so many bytes are page-locked in one load: it takes about 0.8 s a GB.
LOCKED_A_LOAD = 2 << 30
# Where the masters lie.
_HOME = torch.device("cpu")


class LayerStore:
    """Places ``masters`` on a GPU, all or in part.

    ``skeleton`` makes an empty layer (on the meta device) that any master's tensors fit into.
    ``convert`` turns a resident layer into another form (dequantised); its bytes per layer are then
    ``converted_size``, and nothing can be streamed.
    """

    def __init__(
        self,
        masters: Sequence[nn.Module],
        skeleton: Callable[[], nn.Module],
        convert: Callable[[nn.Module], nn.Module] | None = None,
        converted_size: int | None = None,
    ) -> None:
        self.masters, self.skeleton, self.convert = masters, skeleton, convert
        self.layouts = [Layout.of(master) for master in masters]
        self.sizes = [converted_size or layout.size for layout in self.layouts]
        self.device: torch.device | None = None
        self._resident: dict[int, nn.Module] = {}
        self._locked: dict[int, Tensor] = {}
        self._went: set[int] = set()
        self._to_lock = 0
        self._told = False

    @property
    def total(self) -> int:
        """Bytes of all layers on the GPU."""
        return sum(self.sizes)

    @property
    def loaded(self) -> int:
        """Bytes on the GPU between runs."""
        return sum(self.sizes[index] for index in self._resident)

    @property
    def buffers(self) -> int:
        """Bytes that a run takes beside the resident layers."""
        streamed = [layout.size for i, layout in enumerate(self.layouts) if i not in self._resident]
        return min(BUFFERS, len(streamed)) * max(streamed, default=0)

    def load(self, device: torch.device, budget: float, on_layer: OnLayer | None = None) -> int:
        """Make layers resident, first ones first, until ``budget`` bytes are used; returns bytes added.

        If not all fit, the streamed ones' buffers come out of the budget too. ``on_layer(done, total)``
        may raise to cancel: what is there by then stays.
        """
        device = self._moved_to(device)
        before, self._to_lock = self.loaded, LOCKED_A_LOAD
        wanted = self._fitting(budget)
        for index in wanted:
            if index not in self._resident:
                self._place(index, device)
            if on_layer is not None:
                on_layer(index + 1, len(wanted))
        return self.loaded - before

    def unload(self, enough: float = float("inf")) -> int:
        """Let layers go, last ones first, until ``enough`` bytes are free; returns bytes freed."""
        freed = 0
        for index in sorted(self._resident, reverse=True):
            if freed >= enough:
                break
            self._release(index)
            freed += self.sizes[index]
        return freed

    def _release(self, index: int) -> None:
        del self._resident[index]
        self._went.add(index)
        self._left(index)

    def on(self, device: torch.device) -> Iterator[nn.Module]:
        """The layers in order, ready to run on ``device``: each valid until the next is asked for."""
        if device == _HOME:
            return iter(self.masters)
        return self._run(self._moved_to(device), range(len(self.masters)))

    def _moved_to(self, device: torch.device) -> torch.device:
        """``device`` with its number ("cuda" is no other than "cuda:0"); layers elsewhere are let go."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device != self.device:
            self.unload()
            self.device = device
        return device

    def _fitting(self, budget: float) -> range:
        if self.total <= budget:
            return range(len(self.masters))
        budget -= BUFFERS * max(layout.size for layout in self.layouts)
        count = 0
        while count < len(self.sizes) and sum(self.sizes[: count + 1]) <= budget:
            count += 1
        return range(count)

    def _place(self, index: int, device: torch.device) -> None:
        """Make a layer resident. One that comes back is likely to go and come again: it is page-locked, a few
        in each load, which costs a copy now and makes each later one several times as fast."""
        if index in self._went and index not in self._locked and _copies_faster_locked(device):
            self._to_lock -= self.layouts[index].size
            if self._to_lock >= 0:
                self.lock(index)
        self._resident[index] = self._placed(index, device)
        if index not in self._went:
            self._locked.pop(index, None)

    def _placed(self, index: int, device: torch.device) -> nn.Module:
        layout = self.layouts[index]
        flat = torch.empty(layout.size, dtype=torch.uint8, device=device)
        self.copy(index, flat)
        layer = self._seated(index, layout.views(flat), self.skeleton)
        return layer if self.convert is None else self.convert(layer)

    def _seated(self, index: int, tensors: dict[str, Tensor], shell: Callable[[], nn.Module]) -> nn.Module:
        """A layer that has these tensors, in ``shell()`` unless the layer has a body of its own."""
        return assign(shell(), tensors)

    def _left(self, index: int) -> None:
        """The layer's tensors on the GPU are about to go."""

    def copy(self, index: int, flat: Tensor) -> None:
        """A master's bytes to ``flat``: one copy if they are page-locked, else tensor by tensor."""
        locked = self._locked.get(index)
        if locked is not None:
            flat[: len(locked)].copy_(locked, non_blocking=True)
            return
        source = self.masters[index].state_dict()
        for name, view in self.layouts[index].views(flat).items():
            view.copy_(source[name])

    def lock(self, index: int) -> None:
        """Page-lock a copy of a layer that is about to be streamed, if RAM allows; said once if not."""
        if index in self._locked:
            return
        size = self.layouts[index].size
        flat = pinned(size) if available_ram() > size + _RAM_RESERVE else None
        if flat is not None:
            self.copy(index, flat)
            self._locked[index] = flat
        elif not self._told:
            self._told = True
            log.info("RAM is short: layers are streamed from ordinary memory, more slowly.")

    def _run(self, device: torch.device, indices: Sequence[int]) -> Iterator[nn.Module]:
        streamed = [index for index in indices if index not in self._resident]
        if streamed and self.convert is not None:
            raise RuntimeError("dequantised layers cannot be streamed")
        stream = _Stream(self, streamed, device)
        try:
            for index in indices:
                yield self._resident[index] if index in self._resident else stream.take(index)
        finally:
            stream.close()


def _copies_faster_locked(device: torch.device) -> bool:
    return device.type == "cuda"


class _Stream:
    """One run's buffers. ``take`` starts the copy after next, into the buffer that the layer before has just
    left, and hands out the layer whose copy is due. Only CUDA copies aside; elsewhere copies are in line."""

    def __init__(self, store: LayerStore, order: Sequence[int], device: torch.device) -> None:
        self.store, self.order, self.device = store, order, device
        self.started = 0
        self.copied: dict[int, torch.cuda.Event] = {}
        self.seated: int | None = None
        self.side = torch.cuda.Stream(device) if order and device.type == "cuda" else None
        if order:
            size = max(store.layouts[index].size for index in order)
            self.shell = store.skeleton()
            self.flats = [torch.empty(size, dtype=torch.uint8, device=device) for _ in order[:BUFFERS]]

    def take(self, index: int) -> nn.Module:
        """The layer, once its bytes are there; the layer taken before has been issued by now."""
        position = self.order.index(index)
        while self.started < min(position + BUFFERS, len(self.order)):
            self._start(self.started)
            self.started += 1
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied.pop(position))
        self._leave()
        self.seated = index
        views = self.store.layouts[index].views(self.flats[position % BUFFERS])
        return self.store._seated(index, views, lambda: self.shell)

    def _leave(self) -> None:
        if self.seated is not None:
            self.store._left(self.seated)

    def _start(self, position: int) -> None:
        flat = self.flats[position % BUFFERS]
        if self.side is None:
            self.store.copy(self.order[position], flat)
            return
        self.store.lock(self.order[position])
        # Everything issued so far may still read what is about to be overwritten.
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            self.store.copy(self.order[position], flat)
            self.copied[position] = self.side.record_event()

    def close(self) -> None:
        """Wait for copies under way: their buffers are about to go."""
        self._leave()
        if self.side is not None:
            self.side.synchronize()
