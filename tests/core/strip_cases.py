"""Random strips of the VAE's decoder, and what they are held to, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def strip(channels: int, rows: int, width: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    """[1, C, rows, width], channels together, each with a mean and a deviation of its own."""
    deviation = torch.linspace(0.5, 2, channels).view(1, -1, 1, 1)
    means = mean * torch.linspace(0.9, 1.1, channels).view(1, -1, 1, 1)
    x = means + deviation * torch.randn(1, channels, rows, width)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def inside(x: Tensor) -> Tensor:
    """The same numbers as the inner rows of a taller strip of NaNs: a view with an offset."""
    _, channels, rows, width = x.shape
    taller = x.new_full((1, channels, rows + 3, width), float("nan"))
    taller = taller.contiguous(memory_format=torch.channels_last)
    taller[:, :, 1:-2] = x
    return taller[:, :, 1:-2]


def combined(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance [C] of all parts, in fp64."""
    count, means, squares = moments.double().unbind(1)
    mean = (count * means).sum(0) / count.sum(0)
    variance = (squares + count * (means - mean).square()).sum(0) / count.sum(0)
    return count.sum(0), mean, variance


def group_norm(pictures: list[Tensor], weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Scale and shift [2, C] of the norm over strips of one picture, in fp64."""
    x = torch.cat([part.double() for part in pictures], 2).reshape(groups, -1)
    channels = len(weight) // groups
    deviation = torch.sqrt(x.var(1, correction=0) + eps).repeat_interleave(channels)
    scale = weight.double() / deviation
    return torch.stack([scale, bias.double() - scale * x.mean(1).repeat_interleave(channels)])
