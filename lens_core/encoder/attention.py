"""GPT-OSS attention: grouped heads, YaRN positions, a sliding window and learned sinks.

A sink is one logit per head that joins the softmax's denominator and nothing else. It is computed
exactly as one more key and value of zeros whose score, the query's product with zero, is replaced
through the mask by the sink.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import EncoderConfig
from ..ops import Operations
from .packing import Block, Packing

# Memory-efficient attention wants rows of masks to begin at multiples of this many elements.
_ALIGN = 8


def yarn_table(config: EncoderConfig, positions: Tensor) -> Tensor:
    """Cosine and sine [2, T, head_dim / 2] in fp32 at ``positions`` [T], slow frequencies stretched.

    Frequencies that turn more than ``beta_fast`` times over the original length stay, those below
    ``beta_slow`` are divided by ``factor``, those between are blended linearly; the bounds are not
    rounded (GPT-OSS sets truncate = False). Both tables carry YaRN's 0.1 ln(factor) + 1.
    """
    dim = config.head_dim

    def dimension_turning(rotations: float) -> float:
        turns = config.rope_original_length / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low = max(dimension_turning(config.rope_beta_fast), 0)
    high = min(dimension_turning(config.rope_beta_slow), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / config.rope_theta ** (2 * pairs / dim)
    stretched = ((pairs - low) / (high - low)).clamp(0, 1)
    frequency = frequency / config.rope_factor * stretched + frequency * (1 - stretched)
    angle = positions.float()[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]) * (0.1 * math.log(config.rope_factor) + 1)


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [T, heads, D] in fp32; channel i pairs with channel i + D / 2 (not adjacent ones)."""
    cos, sin = table.unsqueeze(2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys], True where row may look at column: not ahead, not ``window`` or more behind.

    The last query stands at the last key.
    """
    position = torch.arange(keys - queries, keys, device=device)
    behind = position[:, None] - torch.arange(keys, device=device)
    keep = behind >= 0
    return keep if window is None else keep & (behind < window)


def sink_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [n, heads, D], k and v [m, kv heads, D], mask [heads, n, m + 1] (last: the sinks) -> like q.

    Heads that share keys are laid along the queries, so nothing is repeated.
    """
    length, heads, dim = q.shape
    shared = k.shape[1]
    query = q.unflatten(1, (shared, -1)).permute(1, 2, 0, 3).reshape(1, shared, -1, dim)
    key, value = (F.pad(x, (0, 0, 0, 0, 0, 1)).transpose(0, 1).unsqueeze(0) for x in (k, v))
    scores = mask.unflatten(0, (shared, -1)).flatten(1, 2).unsqueeze(0)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=scores)
    return out.unflatten(2, (-1, length))[0].permute(2, 0, 1, 3).reshape(length, heads, dim)


class AttentionPlan:
    """What all layers of one run share: the rotation's table, and masks whose last column each layer sets.

    Masks of equal shape are one buffer; layers run one after the other, so one writes it at a time.
    """

    def __init__(
        self, config: EncoderConfig, packing: Packing, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.packing, self.device, self.dtype = config, packing, device, dtype
        self.rotary = yarn_table(config, packing.positions.to(device))
        self._masks: dict[tuple[int, int, bool], Tensor] = {}

    def mask(self, block: Block, sinks: Tensor, sliding: bool) -> Tensor:
        """Additive [heads, queries, keys + 1] for one block, ``sinks`` [heads] in the last column."""
        queries = block.stop - block.start
        keys = block.stop - block.first + (self.packing.prefix if block.after else 0)
        name = (queries, keys, sliding)
        if name not in self._masks:
            self._masks[name] = self._empty_mask(*name, heads=len(sinks))
        mask = self._masks[name][..., : keys + 1]
        mask[..., keys] = sinks.unsqueeze(-1)
        return mask

    def _empty_mask(self, queries: int, keys: int, sliding: bool, heads: int) -> Tensor:
        width = -(-(keys + 1) // _ALIGN) * _ALIGN
        mask = torch.zeros(heads, queries, width, dtype=self.dtype, device=self.device)
        window = self.config.sliding_window if sliding else None
        mask[..., :keys].masked_fill_(~causal_mask(queries, keys, window, self.device), -math.inf)
        return mask


class SinkAttention(nn.Module):
    """Self-attention of one GPT-OSS layer."""

    def __init__(self, config: EncoderConfig, operations: Operations, **place: Any) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        inner, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.head_dim = dim
        self.q_proj = operations.Linear(hidden, inner, **place)
        self.k_proj = operations.Linear(hidden, kv, **place)
        self.v_proj = operations.Linear(hidden, kv, **place)
        self.o_proj = operations.Linear(inner, hidden, **place)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads, **place))

    def forward(
        self, x: Tensor, plan: AttentionPlan, past: Tensor | None, sliding: bool
    ) -> tuple[Tensor, Tensor]:
        """x [T, H] -> [T, H], and the prefix's keys and values [2, P, kv heads, D].

        ``past`` are those from an earlier run; None where the prefix leads this batch.
        """
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_halves(q, plan.rotary), rotate_halves(k, plan.rotary)
        if past is None:
            past = torch.stack([k[: plan.packing.prefix], v[: plan.packing.prefix]])
        parts = []
        for block in plan.packing.blocks:
            keys, values = k[block.first : block.stop], v[block.first : block.stop]
            if block.after:
                keys, values = torch.cat([past[0], keys]), torch.cat([past[1], values])
            mask = plan.mask(block, self.sinks, sliding)
            parts.append(sink_attention(q[block.start : block.stop], keys, values, mask))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.o_proj(out.flatten(1)), past
