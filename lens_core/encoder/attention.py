"""GPT-OSS attention: grouped heads, YaRN positions, a sliding window and learned sinks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import EncoderConfig
from ..kernels import AttentionPlan, Kernels
from ..kernels.eager import rotate_halves
from ..ops import Operations, joined


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
        self, x: Tensor, plan: AttentionPlan, past: Tensor | None, sliding: bool, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """x [T, H] -> [T, H], and the prefix's keys, rotated, and values [2, P, kv heads, D].

        ``past`` are those from an earlier run; None where this batch begins with the prefix.
        """
        q, k, v = self._project(x)
        if past is None:
            count = plan.prefix
            past = torch.stack([rotate_halves(k[:count], plan.rotary[:, :count]), v[:count]])
        out = kernels.attention(q, k, v, past, self.sinks, plan, sliding)
        return self.o_proj(out.flatten(1)), past

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, heads, D], k and v [T, kv heads, D]: one product where the weights are neighbours in memory,
        as a layer store lays them and as OpenAI's own files have them."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        weight, bias = joined([layer.weight for layer in layers]), joined([layer.bias for layer in layers])
        if weight is None or bias is None:
            parts = [layer(x) for layer in layers]
        else:
            every = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
            parts = every.split([len(layer.bias) for layer in layers], dim=-1)
        q, k, v = (part.view(len(x), -1, self.head_dim) for part in parts)
        return q, k, v
