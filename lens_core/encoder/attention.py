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


def yarn_table(config: EncoderConfig, length: int, device: torch.device) -> Tensor:
    """Cosine and sine [2, length, head_dim / 2] in fp32, with YaRN's stretched slow frequencies.

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
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=device)
    frequency = 1.0 / config.rope_theta ** (2 * pairs / dim)
    stretched = ((pairs - low) / (high - low)).clamp(0, 1)
    frequency = frequency / config.rope_factor * stretched + frequency * (1 - stretched)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]) * (0.1 * math.log(config.rope_factor) + 1)


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [B, heads, S, D]; channel i pairs with channel i + D / 2 (not adjacent ones)."""
    cos, sin = table.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """[S, S], True where row may look at column: not ahead, not ``window`` or more behind."""
    position = torch.arange(length, device=device)
    behind = position[:, None] - position[None, :]
    keep = behind >= 0
    return keep if window is None else keep & (behind < window)


def sink_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, keep: Tensor) -> Tensor:
    """q [B, heads, S, D], k and v [B, kv heads, S, D], sinks [heads], keep [S, S] -> like q."""
    heads, length = q.shape[1], q.shape[2]
    groups = heads // k.shape[1]
    k = F.pad(k, (0, 0, 0, 1)).repeat_interleave(groups, dim=1)
    v = F.pad(v, (0, 0, 0, 1)).repeat_interleave(groups, dim=1)
    scores = torch.zeros(length, length, dtype=q.dtype, device=q.device)
    scores.masked_fill_(~keep, -math.inf)
    column = sinks.to(q).view(heads, 1, 1).expand(heads, length, 1)
    mask = torch.cat([scores.expand(heads, -1, -1), column], dim=-1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class SinkAttention(nn.Module):
    """Self-attention of one GPT-OSS layer."""

    def __init__(self, config: EncoderConfig, layer: int, operations: Operations, **place: Any) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        inner, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.head_dim = dim
        self.window = config.sliding_window if config.is_sliding(layer) else None
        self.q_proj = operations.Linear(hidden, inner, **place)
        self.k_proj = operations.Linear(hidden, kv, **place)
        self.v_proj = operations.Linear(hidden, kv, **place)
        self.o_proj = operations.Linear(inner, hidden, **place)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads, **place))

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]; rotary [2, S, D / 2]."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        keep = causal_mask(x.shape[1], self.window, x.device)
        q, k = rotate_halves(q, rotary), rotate_halves(k, rotary)
        out = sink_attention(q, k, v, self.sinks, keep)
        return self.o_proj(out.transpose(1, 2).flatten(2))
