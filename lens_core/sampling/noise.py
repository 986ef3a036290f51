"""The reference's starting noise, token by token.

A seed gives the reference's picture only with its noise: drawn as [B, N, C] in the model's dtype on
the device that computes, where ComfyUI draws [B, C, h, w] in fp32 on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_noise(
    seed: int,
    batch: int,
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Standard normal noise [B, N, C]. CPU and GPU generators differ, as in the reference."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (batch, tokens, channels)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def tokens_to_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, C] -> [B, C, h, w]."""
    return x.transpose(1, 2).unflatten(-1, grid)


def grid_to_tokens(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, N, C]."""
    return x.flatten(2).transpose(1, 2)
