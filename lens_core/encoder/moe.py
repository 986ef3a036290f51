"""Router and experts of one GPT-OSS layer.

The experts' bytes stay packed, in ordinary uint8 buffers: the module moves, counts and frees like any
other. ``DenseExperts`` is the same dequantised once, for GPUs with room for 38 GB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import EncoderConfig
from ..kernels import Bank, DenseMatrices, Kernels, PackedMatrices
from ..kernels.eager import dense
from ..ops import Operations
from ..quant import FORMATS


class PackedExperts(nn.Module):
    """The bank: gate_up [E, 2 I, H] and down [E, H, I] in 4 bits, biases in full."""

    def __init__(
        self,
        config: EncoderConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.format = FORMATS[config.expert_format]
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            blocks = torch.empty(experts, rows, columns // 32, 16, dtype=torch.uint8, device=device)
            scales = torch.empty(
                experts, rows, columns // self.format.group, dtype=torch.uint8, device=device
            )
            self.register_buffer(f"{name}_blocks", blocks)
            self.register_buffer(f"{name}_scales", scales)
            if self.format.has_scale:
                self.register_buffer(f"{name}_scale", torch.empty(experts, device=device))
            bias = nn.Parameter(torch.empty(experts, rows, dtype=dtype, device=device))
            self.register_parameter(f"{name}_bias", bias)

    def bank(self) -> Bank:
        """The tensors as the kernels take them."""
        return Bank(self._matrices("gate_up_proj"), self._matrices("down_proj"), self.alpha, self.limit)

    def largest_scale(self) -> int:
        """The largest e8m0 scale byte; 0 where the scales are in another format."""
        if self.format.has_scale:
            return 0
        scales = (getattr(self, f"{name}_proj_scales") for name in ("gate_up", "down"))
        return max(int(tensor.max()) for tensor in scales)

    def dense(self, dtype: torch.dtype) -> DenseExperts:
        """The same bank dequantised, on this one's device."""
        return DenseExperts(self.bank(), dtype)

    def _matrices(self, name: str) -> PackedMatrices:
        # Straight from the dicts: attribute look-up on modules is slow, and this runs in every layer.
        buffers, bias = self._buffers, self._parameters[f"{name}_bias"]
        blocks, scales, scale = (buffers.get(f"{name}_{part}") for part in ("blocks", "scales", "scale"))
        return PackedMatrices(blocks, scales, scale, bias, self.format)  # type: ignore[arg-type]


class DenseExperts(nn.Module):
    """A bank dequantised once: four times the bytes, for any GPU's own matrix product."""

    gate_up_proj: Tensor
    gate_up_proj_bias: Tensor
    down_proj: Tensor
    down_proj_bias: Tensor

    def __init__(self, bank: Bank, dtype: torch.dtype) -> None:
        super().__init__()
        self.alpha, self.limit = bank.alpha, bank.limit
        for name, matrices in (("gate_up_proj", bank.gate_up), ("down_proj", bank.down)):
            self.register_buffer(name, dense(matrices, dtype))
            self.register_buffer(f"{name}_bias", matrices.bias.to(dtype))

    def bank(self) -> Bank:
        """The tensors as the kernels take them."""
        gate_up = DenseMatrices(self.gate_up_proj, self.gate_up_proj_bias)
        return Bank(gate_up, DenseMatrices(self.down_proj, self.down_proj_bias), self.alpha, self.limit)

    def largest_scale(self) -> int:
        """There are no scales."""
        return 0


class MixtureOfExperts(nn.Module):
    """Top-4 routing: softmax over the four chosen logits only."""

    def __init__(self, config: EncoderConfig, operations: Operations, **place: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = operations.Linear(config.hidden_size, config.num_local_experts, **place)
        self.experts: PackedExperts | DenseExperts = PackedExperts(config, **place)

    def forward(self, x: Tensor, kernels: Kernels) -> Tensor:
        """x [T, H] -> the chosen experts' weighted results fp32 [T, K, H], to be summed over K."""
        chosen, routing = kernels.route(x, self.router.weight, self.router.bias, self.top_k)
        return kernels.experts(x, chosen, routing, self.experts.bank())
