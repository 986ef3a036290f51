"""Recording and playing without CUDA: the graph is a stand-in that computes on the CPU what was recorded, in
the memory it was recorded with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core.denoiser import BlockGraphs, LensDenoiser
from lens_core.denoiser import graph as module
from lens_core.denoiser.block import Shared, run_blocks
from lens_core.kernels import EAGER_LINEAR
from lens_core.quantized import form_of


def inputs(grid: tuple[int, int] = (5, 3), tokens: int = 4, sigma: float = 0.6, batch: int = 1) -> tuple:
    """Arguments of a forward; each call draws others."""
    text = torch.randn(batch, tokens, 4, 64)
    return torch.randn(batch, grid[0] * grid[1], 128), torch.full((batch,), sigma), text, grid


class Graph:
    """Records the calls of ``run_blocks`` while it is the current one; replays them into the same memory."""

    current: Graph | None = None

    def __init__(self) -> None:
        self.work: list[tuple[tuple, list[Tensor]]] = []

    def replay(self) -> None:
        for arguments, out in self.work:
            for memory, result in zip(out, run_blocks(*arguments), strict=True):
                memory.copy_(result)


def install(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Graph, Any]]:
    """Blocks can be recorded; -> the graphs and the pools of their memory."""
    made: list[tuple[Graph, Any]] = []
    pools = iter(range(1, 100))

    @contextmanager
    def record(graph: Graph, pool: Any):
        made.append((graph, pool))
        Graph.current = graph
        yield
        Graph.current = None

    def spy(*arguments: Any) -> list[Tensor]:
        out = run_blocks(*arguments)
        if Graph.current is not None:
            Graph.current.work.append((arguments, out))
            for memory in out:  # nothing is computed while it is recorded
                memory.fill_(float("nan"))
        return out

    monkeypatch.setattr(module, "why_not", lambda *_: None)
    monkeypatch.setattr(module, "run_blocks", spy)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    return made


def runs(played: int, recorded: int, launched: int) -> dict[str, int]:
    return {"played": played, "recorded": recorded, "launched": launched}


def check(denoiser: LensDenoiser, graphs: BlockGraphs, *arguments: Any, **options: Any) -> Tensor:
    """A forward by graphs equals one without, bit for bit."""
    got = denoiser(*arguments, graphs=graphs, **options)
    assert torch.equal(got, denoiser(*arguments, **options))
    return got


def shared_with(**changed: Any) -> Shared:
    whole = Shared(
        SimpleNamespace(name="triton"),
        EAGER_LINEAR,
        None,
        torch.zeros(1),
        None,
        lambda norm, _: norm.weight,
        form_of,
        lambda layer, _: layer.packed(),
    )
    return replace(whole, **changed)


def settled(denoiser: LensDenoiser, graphs: BlockGraphs) -> Callable[[], dict[str, int]]:
    """Record one size; -> forwards of that size, and what they were since the call before."""
    for _ in range(2):
        check(denoiser, graphs, *inputs())

    def forward() -> dict[str, int]:
        before = dict(graphs.runs)
        check(denoiser, graphs, *inputs())
        return {name: count - before[name] for name, count in graphs.runs.items() if count != before[name]}

    assert forward() == {"played": 1}
    return forward
