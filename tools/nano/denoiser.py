"""The denoiser for training: the product's own, with what lies between its matrix products compiled.

Only how the definitions run differs: torch.compile fuses dozens of small operations, forward and backward,
which is most of the time at this size. The product's Triton kernels have no gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_core.config import DenoiserConfig
from lens_core.denoiser import LensDenoiser
from lens_core.denoiser.block import Shared
from lens_core.kernels import EAGER_BLOCK, BlockKernels
from lens_core.quant.policy import is_quantized
from lens_core.quantized import linear_sizes


@cache
def compiled_block() -> BlockKernels:
    """The definitions, compiled when they first run."""
    # One function stands at five places of a block's way, and each is compiled for one size, then for any.
    torch._dynamo.config.recompile_limit = 32

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True)

    return BlockKernels(
        "compiled",
        compiled(EAGER_BLOCK.add_modulate),
        compiled(EAGER_BLOCK.joint_heads),
        compiled(EAGER_BLOCK.swiglu),
    )


class AlignedLinear(nn.Linear):
    """A linear whose sides are filled up with zeros to a multiple of 8; its neighbours' are too.

    The MLPs' width of 341 sends matrix products to kernels that take twice the time.
    """

    def forward(self, x: Tensor) -> Tensor:
        missing = (0, -self.in_features % 8, 0, -self.out_features % 8)
        return F.linear(x, F.pad(self.weight, missing), self.bias)


class _Operations:
    """``torch.nn`` but for linears."""

    Linear, RMSNorm, LayerNorm = AlignedLinear, nn.RMSNorm, nn.LayerNorm


class TrainedDenoiser(LensDenoiser):
    """LensDenoiser that on a GPU gathers gradients through compiled definitions."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config, _Operations)

    def shared(self, *args: Any) -> Shared:
        shared = super().shared(*args)
        gathers = torch.is_grad_enabled() and shared.kernels is EAGER_BLOCK
        return replace(shared, kernels=compiled_block()) if gathers and args[0].is_cuda else shared

    def hidden(self) -> list[nn.Parameter]:
        """The blocks' matrices that the policy of quantisation would round too: attention's and the MLPs'."""
        layers = [self.get_submodule(name) for name in linear_sizes(self) if is_quantized(name)]
        return [layer.get_parameter("weight") for layer in layers]
