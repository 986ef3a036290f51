"""Keys and values of the tokens so far, and the attention of one new token over them.

Sliding layers keep one window in a ring, full layers everything, in buffers that grow by ``_STEP`` rows.
Which rows count is in a mask and never in a shape, and where the new token stands is a tensor on the device:
so every token's step is the same work in the same memory, and can be recorded.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import EncoderConfig
from ..encoder.attention import yarn_table
from ..encoder.packing import pack
from ..kernels import AttentionPlan, Kernels
from ..kernels.eager import rotate_halves

_STEP = 512
# Memory-efficient attention wants rows of masks to begin at multiples of this many elements.
_ALIGN = 8


class _Slots:
    """The rows of one kind of layer: ``capacity`` for tokens, and after them zeros, the last of which is the
    sink's key and value (see ``kernels.eager.sink_attention``).

    ``mask`` [kv heads, heads of each, rows] is one buffer for all layers of the kind: each sets its sinks
    in the last column as it runs.
    """

    def __init__(
        self, config: EncoderConfig, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.rows = -(-(capacity + 1) // _ALIGN) * _ALIGN
        shared = config.num_key_value_heads
        shape = (shared, config.num_attention_heads // shared, self.rows)
        self.mask = torch.full(shape, -math.inf, dtype=dtype, device=device)
        self.row = torch.arange(self.rows, device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)

    def turn(self, position: Tensor) -> None:
        """Make the row of ``position`` [1] the one to write, and open those of all tokens up to it."""
        self.index = position % self.capacity
        closed = (self.row > position) | (self.row >= self.capacity)
        base = torch.zeros_like(self.row, dtype=self.mask.dtype).masked_fill_(closed, -math.inf)
        self.mask.copy_(base.expand_as(self.mask))


class KeyValueCache:
    """One conversation's. ``layers`` are buffers [2, kv heads, rows, D], ``length`` the tokens in them.

    ``prefilling`` and ``decoding`` are kernels whose attention takes a layer's buffer in the place of the
    prefix's keys and values, so that the encoder's own layers run with it.
    """

    def __init__(
        self, config: EncoderConfig, dtype: torch.dtype, device: torch.device, kernels: Kernels
    ) -> None:
        self.config, self.dtype, self.device, self.kernels = config, dtype, device, kernels
        self.length = 0
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.slots = {
            sliding: self._slots(config.sliding_window if sliding else 0) for sliding in (True, False)
        }
        self.layers = [self._buffer(config.is_sliding(layer)) for layer in range(config.num_hidden_layers)]
        self.prefilling = replace(kernels, attention=self._prefill_attention)
        self.decoding = replace(kernels, attention=self._decode_attention)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    def reserve(self, tokens: int) -> bool:
        """Make room for so many tokens in all; whether that took other buffers than before."""
        old = self.slots[False]
        if tokens <= old.capacity:
            return False
        self.slots[False] = self._slots(-(-(tokens + 1) // _STEP) * _STEP - 1)
        for index, layer in enumerate(self.layers):
            if not self.config.is_sliding(index):
                self.layers[index] = self._buffer(False)
                self.layers[index][:, :, : old.capacity] = layer[:, :, : old.capacity]
        return True

    def begin(self, tokens: int) -> AttentionPlan:
        """The plan of the first ``tokens`` tokens, all in one run; the buffers are empty."""
        self.reserve(tokens + 1)
        self.length = tokens
        packing = pack([range(tokens)], after=0)
        rotary = yarn_table(self.config, packing.positions.to(self.device))
        return AttentionPlan(
            packing.blocks, packing.positions, rotary, 0, self.config.sliding_window, self.dtype
        )

    def advance(self) -> bool:
        """Go on to the next token; whether buffers were replaced by larger ones."""
        grown = self.reserve(self.length + 1)
        self.position.fill_(self.length)
        self.length += 1
        return grown

    def plan(self) -> AttentionPlan:
        """The plan of the token that ``advance`` came to; computed on the device."""
        for slots in self.slots.values():
            slots.turn(self.position)
        rotary = yarn_table(self.config, self.position)
        return AttentionPlan((), self.position, rotary, 0, self.config.sliding_window, self.dtype)

    def _prefill_attention(
        self, q: Tensor, k: Tensor, v: Tensor, past: Tensor, sinks: Tensor, plan: AttentionPlan, sliding: bool
    ) -> Tensor:
        """As ``kernels.eager.attention``; the last keys, rotated, and values go to the buffer ``past``."""
        capacity = self.slots[sliding].capacity
        first = max(0, len(k) - capacity)
        index = torch.arange(first, len(k), device=k.device) % capacity
        kept = torch.stack([rotate_halves(k, plan.rotary)[first:], v[first:]])
        past.index_copy_(2, index, kept.transpose(1, 2))
        return self.kernels.attention(q, k, v, k.new_empty(2, 0, *k.shape[1:]), sinks, plan, sliding)

    def _decode_attention(
        self, q: Tensor, k: Tensor, v: Tensor, past: Tensor, sinks: Tensor, plan: AttentionPlan, sliding: bool
    ) -> Tensor:
        """q [1, heads, D], k and v [1, kv heads, D] -> [1, heads, D], over ``past`` and this."""
        slots, heads = self.slots[sliding], [q.shape[1], k.shape[1]]
        q, k = rotate_halves(torch.cat([q, k], dim=1), plan.rotary).split(heads, dim=1)
        past.index_copy_(2, slots.index, torch.stack([k, v]).transpose(1, 2))
        slots.mask[..., -1] = sinks.view(slots.mask.shape[:2])
        query = q.reshape(1, *slots.mask.shape[:2], -1)
        out = F.scaled_dot_product_attention(query, past[:1], past[1:], attn_mask=slots.mask.unsqueeze(0))
        return out.view(q.shape)

    def _slots(self, capacity: int) -> _Slots:
        return _Slots(self.config, capacity, self.dtype, self.device)

    def _buffer(self, sliding: bool) -> Tensor:
        shape = (2, self.config.num_key_value_heads, self.slots[sliding].rows, self.config.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def cache_bytes(config: EncoderConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of so many tokens, growth included: old and new buffers are there at once
    for one layer."""
    row = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    full = sum(not config.is_sliding(layer) for layer in range(config.num_hidden_layers))
    rows = tokens + _STEP
    return row * ((full + 1) * rows + (config.num_hidden_layers - full) * (config.sliding_window + _ALIGN))
