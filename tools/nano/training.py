"""What every training here shares: masters of weights, recorded steps, schedules, checkpoints, curves."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lens_core.quant.layer_format import affine4
from lens_core.quant.linear import dequantize, quantize
from lens_core.quant.policy import fits

from .muon import Muon, by


def run_flags(
    parser: argparse.ArgumentParser, out: str, *, steps: int, batch: int, rate: float, workers: int
) -> None:
    """The flags that every training has; ``out`` describes the run's folder."""
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch, help="examples a step")
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--workers", type=int, default=workers)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def clock_flags(parser: argparse.ArgumentParser) -> None:
    """Those of ``Clock``."""
    parser.add_argument("--minutes", type=float, default=1e9, help="of this run")
    parser.add_argument("--finish", action="store_true", help="the training ends when the minutes do")


def four_bits_flag(parser: argparse.ArgumentParser) -> None:
    """That of ``Masters``."""
    parser.add_argument(
        "--four_bits", type=float, default=0.5, help="share of the steps with projections in 4 bits"
    )


class Masters:
    """fp32 copies of parameters with their optimisers, and their running average, which is what is exported.

    Muon moves the ``hidden`` ones, matrices between two layers; AdamW all others. In a share ``four_bits`` of
    the steps the parameters of ``rounded`` are their masters in 4 bits, so that a model learns to be right in
    both; gradients are taken as if they were not. ``step`` is safe to record into a CUDA graph; the learning
    rate is a tensor, so recorded steps follow it.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        average_over: float = 500.0,
        decay: float = 0.01,
        hidden: Iterable[nn.Parameter] = (),
        rounded: Iterable[nn.Parameter] = (),
        four_bits: float = 0.0,
    ) -> None:
        self.parameters: list[Tensor] = list(parameters)
        device = self.parameters[0].device
        self.values = [p.detach().float().clone() for p in self.parameters]
        self.average = [value.clone() for value in self.values]
        self.rate = torch.zeros((), device=device)
        self.keep = 1 - 1 / average_over
        matrices = {id(parameter) for parameter in hidden}
        self._hidden = [index for index, p in enumerate(self.parameters) if id(p) in matrices]
        in_four = {id(parameter) for parameter in rounded} if four_bits else set()
        self._rounded = [
            index
            for index, p in enumerate(self.parameters)
            if id(p) in in_four and fits((p.shape[0], p.shape[1]), affine4)
        ]
        self.four_bits = four_bits
        self._others = [index for index, p in enumerate(self.parameters) if id(p) not in matrices]
        self.muon = Muon([self.values[index] for index in self._hidden], self.rate, decay)
        on_gpu = device.type == "cuda"
        self.adam = torch.optim.AdamW(
            [self.values[index] for index in self._others],
            lr=self.rate,
            betas=(0.9, 0.98),
            weight_decay=decay,
            fused=on_gpu,
            capturable=on_gpu,
        )

    def step(self, limit: float = 1.0) -> Tensor:
        """Apply the parameters' gradients, their norm limited; returns that norm. Gradients are cleared."""
        gradients = [  # the last block's text stream ends at K and V: the rest of it has no gradient
            torch.zeros_like(value) if parameter.grad is None else parameter.grad.float()
            for value, parameter in zip(self.values, self.parameters, strict=True)
        ]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        for index in self._others:
            self.values[index].grad = gradients[index]
        self.adam.step()
        if self._hidden:
            self.muon.step([gradients[index] for index in self._hidden])
        torch._foreach_lerp_(self.average, self.values, 1 - self.keep)
        self.show(self.values)
        self._round()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    @torch.no_grad()
    def _round(self) -> None:
        """By chance, all of ``rounded`` as the product's 4 bits hold them."""
        now = torch.rand((), device=self.rate.device) < self.four_bits
        for same in by(self._rounded, lambda index: self.values[index].shape[1]):
            joined = torch.cat([self.values[index] for index in same])  # of thousands of rows, each by itself
            in_four = dequantize(quantize(joined, affine4), self.parameters[same[0]].dtype)
            parts = in_four.split([len(self.values[index]) for index in same])
            for index, part in zip(same, parts, strict=True):
                self.parameters[index].copy_(torch.where(now, part, self.parameters[index]))

    def state(self) -> dict[str, Any]:
        """All that a later run needs to go on."""
        return {
            "values": self.values,
            "average": self.average,
            "adam": self.adam.state_dict(),
            "momenta": self.muon.momenta,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; before anything is recorded."""
        torch._foreach_copy_(self.values, state["values"])
        torch._foreach_copy_(self.average, state["average"])
        self.adam.load_state_dict(state["adam"])
        for group in self.adam.param_groups:
            group["lr"] = self.rate
        for mine, given in zip(self.muon.momenta, state["momenta"], strict=True):
            mine.copy_(given)
        self.show(self.values)

    def show(self, values: Sequence[Tensor]) -> None:
        """Put ``values`` (the masters or their average) into the parameters."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, list(values))


class Recorded:
    """A function of fixed inputs, recorded as a CUDA graph at its first call; on a CPU simply called.

    Graphs share one pool of memory: they never run at the same time. What the function returns is
    overwritten by the next call.
    """

    _pool: Any = None

    def __init__(self, function: Callable[..., Tensor], warm_up: int = 2) -> None:
        self.function, self.warm_up = function, warm_up
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if inputs[0].device.type != "cuda":
            return self.function(*inputs)
        if self.graph is None:
            return self._record(inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        assert self.output is not None
        return self.output

    def _record(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The warm-up steps are real ones; recording runs nothing."""
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.warm_up):
                result = self.function(*self.inputs).clone()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        if Recorded._pool is None:
            Recorded._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(self.graph, pool=Recorded._pool):
            self.output = self.function(*self.inputs)
        return result


class Clock:
    """How much of a training is done, by its steps; with ``finish`` also by the minutes of this run."""

    def __init__(self, minutes: float, finish: bool = False) -> None:
        self.start, self.seconds, self.finish = time.monotonic(), 60 * minutes, finish

    def over(self) -> bool:
        """Whether this run must end."""
        return time.monotonic() - self.start >= self.seconds

    def ended(self, step: int, steps: int) -> bool:
        """Whether the run must end or the training is done."""
        return self.over() or self.share(step, steps) >= 1

    def share(self, step: int, steps: int) -> float:
        """1: the training is done."""
        passed = (time.monotonic() - self.start) / self.seconds if self.finish else 0.0
        return max(step / steps, passed)


def rate_at(step: int, share: float, peak: float, warm_up: int = 400, last: float = 0.02) -> float:
    """Linear from 0 to ``peak``, then by the ``share`` done half a cosine down to ``last`` of it."""
    down = last + (1 - last) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
    return peak * min(1.0, (step + 1) / warm_up) * down


class Curves:
    """Losses of a training by step, kept as JSON; prints a line as each mean is taken."""

    def __init__(self, path: Path, every: int = 100) -> None:
        self.path, self.every = path, every
        self.points: list[dict[str, float]] = json.loads(path.read_text()) if path.exists() else []
        self._sums: Tensor | None = None
        self._count, self._start = 0, time.perf_counter()

    def add(self, step: int, names: tuple[str, ...], values: Tensor) -> None:
        """``values`` [len(names)], on any device; looked at only once in ``every`` steps."""
        self._sums = values.detach().clone() if self._sums is None else self._sums + values.detach()
        self._count += 1
        if self._count < self.every:
            return
        means = (self._sums / self._count).tolist()
        seconds, now = time.perf_counter() - self._start, time.perf_counter()
        point = {"step": step, **{n: round(v, 5) for n, v in zip(names, means, strict=True)}}
        self.points.append(point)
        print(point, f"{self._count / seconds:.1f} steps/s", flush=True)
        self._sums, self._count, self._start = None, 0, now

    def save(self) -> None:
        self.path.write_text(json.dumps(self.points) + "\n", encoding="utf-8")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a run that is cut off leaves the one before."""
    unfinished = path.with_suffix(".part")
    torch.save(content, unfinished)
    unfinished.replace(path)
