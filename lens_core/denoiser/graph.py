"""CUDA graphs of the blocks: one launch in place of a thousand, where launching takes longer than computing.

A graph is recorded when the same sizes come a second time, in the time of one forward's launches, and played
from then on. What it was recorded for is looked at before each play: sizes, precision, kernels, and where
every weight lies, so that after a LoRA, an unloaded model or a longer prompt no old graph is played.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..config import is_modulation
from ..kernels import scaled_mm
from .block import LensBlock, Shared, Tables, run_blocks

log = logging.getLogger(__name__)

# Sizes and prompt lengths kept; each holds its inputs and results, and all compute in the same memory.
_KEPT = 8


class _Recording:
    """One graph with inputs and results of its own."""

    def __init__(
        self,
        blocks: Sequence[LensBlock],
        streams: Sequence[Tensor],
        tables: Sequence[Tables],
        shared: Shared,
        pool: Any,
        weights: Sequence[Tensor],
    ) -> None:
        self.streams = [x.clone() for x in streams]
        self.rotary = shared.rotary.clone()
        self.tables = torch.stack(_in_a_row(tables))
        pairs = list(zip(self.tables[::2], self.tables[1::2], strict=True))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.out = run_blocks(blocks, self.streams, pairs, replace(shared, rotary=self.rotary))
        # Read by its products, and no weights themselves: while it may be played, nothing else lies there.
        self.kept = scaled_mm.made_of(weights)

    def play(self, streams: Sequence[Tensor], tables: Sequence[Tables], shared: Shared) -> list[Tensor]:
        """The same for other inputs of the same sizes."""
        for own, x in zip(self.streams, streams, strict=True):
            own.copy_(x)
        self.rotary.copy_(shared.rotary)
        torch.stack(_in_a_row(tables), out=self.tables)
        self.graph.replay()
        return [x.clone() for x in self.out]


def _in_a_row(tables: Sequence[Tables]) -> list[Tensor]:
    """Image's and text's of each block in turn, [B, 6 H] each."""
    return [table for pair in tables for table in pair]


class BlockGraphs:
    """``run_blocks`` by CUDA graphs where that is possible; else as it is, with the reason logged once.

    ``runs`` counts forwards by what happened to them.
    """

    def __init__(self) -> None:
        self.runs = {"played": 0, "recorded": 0, "launched": 0}
        self._recorded: OrderedDict[Hashable, _Recording | None] = OrderedDict()
        self._pool: Any = None
        self._layers: dict[LensBlock, list[nn.Module]] = {}

    def clear(self) -> None:
        """Forget all graphs and give their memory back."""
        self._recorded.clear()
        self._pool = None

    def report(self, before: Mapping[str, int]) -> str:
        """What became of the forwards since ``before``, a copy of ``runs``, in words."""
        played, recorded, launched = (
            self.runs[key] - before[key] for key in ("played", "recorded", "launched")
        )
        return f"{played} of {played + launched} forwards played, {recorded} recorded"

    def run_blocks(
        self, blocks: Sequence[LensBlock], streams: Sequence[Tensor], tables: Sequence[Tables], shared: Shared
    ) -> list[Tensor]:
        """See ``block.run_blocks``. Bit for bit its result: the same kernels in the same order."""
        weights = self._weights(blocks)
        reason = why_not(weights, streams, shared)
        name = None if reason is not None else _name(weights, streams, shared)
        if name in self._recorded:
            recording = self._recorded[name]
            if recording is None:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                recording = _Recording(blocks, streams, tables, shared, self._pool, weights)
                self.runs["recorded"] += 1
            self._keep(name, recording)
            self.runs["played"] += 1
            return recording.play(streams, tables, shared)
        if reason is not None:
            _say_once(reason)
        else:  # nothing is recorded for what comes only once
            self._keep(name, None)
        self.runs["launched"] += 1
        return run_blocks(blocks, streams, tables, shared)

    def _weights(self, blocks: Sequence[LensBlock]) -> list[Tensor]:
        """What a step reads: all but the modulation's. The layers are kept, their weights may be replaced."""
        for block in blocks:
            if block not in self._layers:
                named = block.named_modules(prefix="transformer_blocks")
                self._layers[block] = [module for name, module in named if not is_modulation(name)]
        return [
            part
            for block in blocks
            for layer in self._layers[block]
            for weight in layer._parameters.values()
            if weight is not None
            for part in _parts(weight)
        ]

    def _keep(self, name: Hashable, recording: _Recording | None) -> None:
        self._recorded[name] = recording
        self._recorded.move_to_end(name)
        while len(self._recorded) > _KEPT:
            self._recorded.popitem(last=False)


def _parts(weight: Tensor) -> Sequence[Tensor]:
    """The tensors in whose memory it lies: another package's quantised tensor has several."""
    if type(weight) in (nn.Parameter, Tensor) or not hasattr(weight, "__tensor_flatten__"):
        return (weight,)
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def can_record() -> bool:
    """Whether memory comes from PyTorch's own allocator.

    CUDA's asynchronous one makes memory part of the graph: Triton takes no pointer to it, and one allocation
    that outlives a failed recording ends the process.
    """
    return torch.cuda.get_allocator_backend() == "native"


def why_never(device: torch.device) -> str | None:
    """Why nothing can be recorded on ``device``, in words; None where something can."""
    if device.type != "cuda":
        return f"the model computes on the {device.type.upper()}"
    if torch.version.hip is not None:  # not tried there
        return "they are for NVIDIA GPUs"
    return None if can_record() else "CUDA's asynchronous allocator is in use"


def why_not(weights: Sequence[Tensor], streams: Sequence[Tensor], shared: Shared) -> str | None:
    """Why blocks with these weights cannot be recorded, in words; None where they can."""
    device = streams[0].device
    reason = why_never(device)
    if reason is not None:
        return reason
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*streams, *weights)):
        return "gradients are asked for"
    if shared.attention is not None or shared.mask is not None:
        return "an attention of another's choice, or a mask, may change from step to step"
    if any(weight.device != device for weight in weights):
        return "not all of its weights are on the GPU"
    return None


def _name(weights: Sequence[Tensor], streams: Sequence[Tensor], shared: Shared) -> Hashable:
    """All that a graph is recorded for but its inputs' values."""
    shapes = tuple((x.shape, x.dtype) for x in streams)
    kernels = shared.kernels.name, frozenset(shared.bounded)
    return shapes, kernels, shared.prompts, tuple(weight.data_ptr() for weight in weights)


@cache
def _say_once(reason: str) -> None:
    log.warning("CUDA graphs are on, but the denoiser runs without them: %s.", reason)
