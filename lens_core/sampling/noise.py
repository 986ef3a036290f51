"""The reference's starting noise, token by token.

A seed gives the reference's picture only with its noise: drawn as [B, N, C] in the model's dtype on
the device that computes, where ComfyUI draws [B, C, h, w] in fp32 on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SettingError

# acos of fp32 cannot tell smaller ones from 0.
_SMALLEST_ANGLE = 1e-3


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


def slerp(start: Tensor, end: Tensor, strength: float) -> Tensor:
    """Between two noises [B, ...] on the sphere, picture by picture in fp32: ``start`` itself at 0.

    A straight line between them would be shorter than noise in the middle, and draw flat pictures.
    """
    if not 0 <= strength <= 1:
        raise SettingError(f"The variation's strength must be between 0 and 1, got {strength}.")
    if strength in (0, 1):
        return end if strength else start
    a, b = start.flatten(1).float(), end.flatten(1).float()
    angle = torch.cosine_similarity(a, b, dim=1).clamp(-1, 1).acos()[:, None]
    part = (strength * angle).sin() / angle.sin()
    rest = ((1 - strength) * angle).sin() / angle.sin()
    # Noises in one direction have no arc between them.
    mixed = torch.where(angle > _SMALLEST_ANGLE, rest * a + part * b, torch.lerp(a, b, strength))
    return mixed.reshape(start.shape).to(start.dtype)
