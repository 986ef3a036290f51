"""MXFP4: 32 four-bit floats share one power-of-two scale.

A byte holds two values, the first in its low nibble; a nibble is a sign and an e2m1 magnitude; a
scale byte b stands for 2 ** (b - 127) (e8m0, OCP Microscaling Formats 1.0). Blocks run along the
input dimension. Every product of a value and a scale that fits the exponent range is exact in
bf16, so this conversion loses nothing.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@cache
def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 2]: the two values of every byte, low nibble first."""
    values = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=-1)


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks u8 [..., G, 16] and scales u8 [..., G] -> values [..., 32 G] in ``dtype``."""
    table = _byte_table(dtype, blocks.device)
    values = table.index_select(0, blocks.flatten().int()).view(*blocks.shape[:-1], BLOCK)
    scale = torch.exp2(scales.float() - 127).to(dtype)
    return values.mul_(scale.unsqueeze(-1)).flatten(-2)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest MXFP4 of weight [..., K], K a multiple of 32 -> blocks u8 [..., K/32, 16], scales u8.

    The shared exponent is floor(log2(largest)) - 2, so the largest value lands in [4, 8) and what
    exceeds 6 saturates (the rule of the OCP specification).
    """
    groups = weight.float().unflatten(-1, (-1, BLOCK))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(2.0**-120)
    exponent = largest.log2().floor() - 2
    magnitudes = torch.tensor(_MAGNITUDES, device=weight.device)
    distance = (groups.abs() / torch.exp2(exponent)).unsqueeze(-1) - magnitudes
    code = distance.abs().argmin(-1) + 8 * (groups < 0)
    blocks = (code[..., 0::2] | (code[..., 1::2] << 4)).to(torch.uint8)
    return blocks, (exponent.squeeze(-1) + 127).to(torch.uint8)
