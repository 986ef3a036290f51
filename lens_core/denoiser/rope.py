"""Axial rotary positions of the joint image and text sequence.

Three axes (frame, row, column) turn 8, 28 and 28 of the 64 channels of a head; adjacent channels
are the real and imaginary part of one complex number. Image rows and columns are centred on zero;
text token p sits at max(h // 2, w // 2) + p on all three axes, past the picture's corner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def joint_positions(height: int, width: int, text_length: int, device: torch.device) -> Tensor:
    """Positions [N + S, 3] (frame, row, column) of ``height`` x ``width`` image tokens, then text.

    In fp64, on ``device`` if that has it (Apple's and some of Intel's GPUs do not), else on the CPU.
    """
    place: dict[str, Any] = {"dtype": torch.float64, "device": device if device.type == "cuda" else "cpu"}
    rows = torch.arange(height, **place) - (height - height // 2)
    columns = torch.arange(width, **place) - (width - width // 2)
    image = torch.zeros(height, width, 3, **place)
    image[..., 1] = rows[:, None]
    image[..., 2] = columns[None, :]
    first = max(height // 2, width // 2)
    text = torch.arange(first, first + text_length, **place)[:, None].expand(-1, 3)
    return torch.cat([image.flatten(0, 1), text])


def rotary_table(positions: Tensor, axes_dims: tuple[int, ...], theta: float) -> Tensor:
    """Cosine and sine of every rotation, [2, T, D / 2] in fp32, for positions [T, axes].

    Angles are formed in fp64: those of late text tokens reach 500, where fp32 is off by 1.5e-5.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = theta ** (
            -torch.arange(0, dim, 2, dtype=positions.dtype, device=positions.device) / dim
        )
        angles.append(positions[:, axis, None] * frequencies)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()]).float()
