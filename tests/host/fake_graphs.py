"""CUDA graphs without CUDA: what is recorded computes with the tensors that were the weights then.

As a real graph does, playing reads memory and not modules: weights replaced since have no part in it, and
weights overwritten in place do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


def install(graph: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``graph``, the module of lens_core, record and play on the CPU."""

    class Recording:
        def __init__(
            self, blocks: Sequence[Any], streams: object, tables: object, shared: Any, *_: Any
        ) -> None:
            self.blocks, self.shared = list(blocks), shared
            self.memory = _parameters(self.blocks)

        def play(self, streams: Sequence[Tensor], tables: Any, shared: Any) -> list[Tensor]:
            with _set(self.memory, _parameters(self.blocks)):
                given = replace(self.shared, rotary=shared.rotary)
                return graph.run_blocks(self.blocks, streams, tables, given)

    limits = graph.why_not

    def why_not(weights: Sequence[Tensor], x: Tensor, shared: Any) -> str | None:
        on_gpu = SimpleNamespace(device=torch.device("cuda"), requires_grad=x.requires_grad)
        return limits([], on_gpu, shared)

    monkeypatch.setattr(graph, "_Recording", Recording)
    monkeypatch.setattr(graph, "why_not", why_not)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)


def _parameters(blocks: Sequence[Any]) -> list[tuple[dict, dict]]:
    """Each module's parameters by name: the dictionary itself, and a copy."""
    found = [module._parameters for block in blocks for module in block.modules()]
    return [(parameters, dict(parameters)) for parameters in found]


@contextmanager
def _set(these: list[tuple[dict, dict]], before: list[tuple[dict, dict]]) -> Iterator[None]:
    for parameters, values in these:
        parameters.update(values)
    try:
        yield
    finally:
        for parameters, values in before:
            parameters.update(values)
