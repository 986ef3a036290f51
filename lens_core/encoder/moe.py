"""Router and experts of one GPT-OSS layer, over packed 4-bit bytes.

The bytes stay packed in ordinary uint8 buffers, so the module moves, counts and frees like any
other; this plain-torch path unpacks one expert at a time, only those that some token chose.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import EncoderConfig
from ..ops import Operations
from ..quant import FORMATS


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """[..., 2 I] with gate and up interleaved -> [..., I].

    gate * sigmoid(alpha * gate) * (up + 1), gate clamped from above, up from both sides.
    """
    gate, up = gate_up[..., 0::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


class PackedExperts(nn.Module):
    """The expert banks, gate_up [E, 2 I, H] and down [E, H, I], packed; their biases in full.

    Buffers of a bank of E experts, N rows and K columns: ``_blocks`` u8 [E, N, K/32, 16] (low nibble
    first, in either format), ``_scales`` u8 [E, N, K/group], and for NVFP4 ``_scale`` fp32 [E].
    """

    def __init__(
        self,
        config: EncoderConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.num_experts = config.num_local_experts
        self.format = FORMATS[config.expert_format]
        experts, hidden, inner = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        for name, rows, columns in (
            ("gate_up_proj", 2 * inner, hidden),
            ("down_proj", hidden, inner),
        ):
            blocks = torch.empty(experts, rows, columns // 32, 16, dtype=torch.uint8, device=device)
            groups = columns // self.format.group
            scales = torch.empty(experts, rows, groups, dtype=torch.uint8, device=device)
            self.register_buffer(f"{name}_blocks", blocks)
            self.register_buffer(f"{name}_scales", scales)
            if self.format.has_scale:
                scale = torch.empty(experts, dtype=torch.float32, device=device)
                self.register_buffer(f"{name}_scale", scale)
            bias = nn.Parameter(torch.empty(experts, rows, dtype=dtype, device=device))
            self.register_parameter(f"{name}_bias", bias)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], chosen experts [T, K], their weights [T, K] -> weighted sum [T, H].

        Each (token, slot) pair is written once and the slots are summed in order, so the result
        does not depend on the order in which experts run.
        """
        slots = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.num_experts)
        out = x.new_empty(chosen.numel(), x.shape[1])
        start = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                pairs = order[start : start + count]
                start += count
                out[pairs] = self._expert(x[pairs // slots], expert)
        return (out.unflatten(0, (-1, slots)) * weights.unsqueeze(-1)).sum(1)

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        gate_up = F.linear(x, *self._unpack("gate_up_proj", expert, x))
        hidden = clamped_swiglu(gate_up, self.alpha, self.limit)
        return F.linear(hidden, *self._unpack("down_proj", expert, x))

    def _unpack(self, name: str, expert: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of one expert, on ``like``'s device: offloaded bytes travel packed."""
        parts = ("blocks", "scales", "bias", *(("scale",) if self.format.has_scale else ()))
        blocks, scales, bias, *scale = (
            getattr(self, f"{name}_{part}")[expert].to(like.device) for part in parts
        )
        weight = self.format.dequantize(blocks, scales, scale[0] if scale else None, like.dtype)
        return weight, bias.to(like.dtype)


class MixtureOfExperts(nn.Module):
    """Top-4 routing: softmax over the four chosen logits only."""

    def __init__(self, config: EncoderConfig, operations: Operations, **place: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = operations.Linear(config.hidden_size, config.num_local_experts, **place)
        self.experts = PackedExperts(config, **place)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        tokens = x.flatten(0, 1)
        logits, chosen = self.router(tokens).topk(self.top_k, dim=-1)
        weights = logits.softmax(-1)
        return self.experts(tokens, chosen, weights).view_as(x)
