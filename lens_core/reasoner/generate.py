"""Tokens one after the other, by the encoder's own layers wherever they lie.

The prompt's tokens take all layers at once, as when encoding; from then on one token does, over a cache of
keys and values. On a GPU that holds all layers a token's 700 launches are recorded once and played as a CUDA
graph: launching them would take longer than the 3.7 GB that they read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..denoiser.graph import why_never
from ..kernels import AttentionPlan, Kernels
from ..text_encoder import TextEncoder
from .head import LanguageHead
from .kv_cache import KeyValueCache
from .sampling import Sampler

OnLayer = Callable[[int, int], None]


class Decoder:
    """One conversation: ``prefill`` its ids, then ``step`` with each token that is chosen.

    Both return logits fp32 [V], valid until the next call. ``on_layer(done, total)`` is called after each
    layer and may raise to cancel. ``head`` is on ``device``, the layers where ``text`` has them.
    """

    def __init__(
        self, text: TextEncoder, head: LanguageHead, device: torch.device, on_layer: OnLayer | None = None
    ) -> None:
        text.read(device=device)
        self.text, self.head, self.device, self.on_layer = text, head, device, on_layer
        encoder = text.model
        bank, largest = encoder.experts[0].bank(), encoder.largest_scale()
        self.kernels = kernels.choose(device, text.dtype, bank, largest)
        self.cache = KeyValueCache(encoder.config, text.dtype, device, self.kernels)
        self.row = torch.empty(1, encoder.config.hidden_size, dtype=torch.float32, device=device)
        self._steps = 0
        self._graph: StepGraph | None = None

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """The logits after ``ids``, with which the conversation begins."""
        return self._through(self._embedded(ids), self.cache.begin(len(ids)), self.cache.prefilling)

    def step(self, token: int) -> Tensor:
        """The logits after one more token."""
        if self.cache.advance():
            self._graph = None
        self.row.copy_(self._embedded([token]))
        self._steps += 1
        # The first step is launched, which compiles kernels and makes libraries take their workspaces.
        if self._graph is None and self._steps > 1 and self._can_record():
            self._graph = StepGraph(self._step)
        return self._step() if self._graph is None else self._graph.play()

    def _step(self) -> Tensor:
        return self._through(self.row, self.cache.plan(), self.cache.decoding)

    def _can_record(self) -> bool:
        resident = self.text.layers.buffers == 0
        return resident and self.kernels.name == "triton" and why_never(self.device) is None

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        table = self.text.model.embed_tokens
        return table(torch.tensor(ids, device=table.weight.device)).to(self.device, torch.float32)

    def _through(self, x: Tensor, plan: AttentionPlan, chosen: Kernels) -> Tensor:
        """Residual stream [T, H] -> the last token's logits."""
        config, pending = self.text.model.config, None
        for index, layer in enumerate(self.text.layers.on(self.device)):
            past, sliding = self.cache.layers[index], config.is_sliding(index)
            x, pending, _ = layer(x, pending, plan, past, sliding, chosen)
            if self.on_layer is not None:
                self.on_layer(index + 1, config.num_hidden_layers)
        norm = self.head.norm
        due = None if pending is None else pending[-1:]
        _, last = chosen.add_norm(x[-1:], due, norm.weight, norm.eps, plan.dtype)
        assert last is not None
        return self.head(last)


class StepGraph:
    """A step's launches, recorded; they read and write the memory that they were recorded with."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step()

    def play(self) -> Tensor:
        """The step's logits, the same memory each time."""
        self.graph.replay()
        return self.logits


@torch.inference_mode()
def tokens(decoder: Decoder, ids: Sequence[int], sampler: Sampler, most: int) -> Iterator[int]:
    """What follows ``ids``, token by token, at most ``most`` of them; stop taking them to end it."""
    logits = decoder.prefill(ids)
    for count in range(1, most + 1):
        token = sampler(logits)
        yield token
        if count < most:
            logits = decoder.step(token)
