"""Classifier-free guidance with the conditional prediction's norm.

Plain guidance inflates the velocity; Lens gives each token's guided vector the length of the
conditional one. The ratio is not clamped, so it may also amplify. A factor common to both
predictions drops out, which lets a host that works with x - denoised = sigma * velocity use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..interval import Interval, step_at


def norm_rescaled_guidance(cond: Tensor, uncond: Tensor, scale: float, dim: int = -1) -> Tensor:
    """u + g (p - u), rescaled along ``dim`` (the channels of a token) to the norm of p.

    ``cond`` p and ``uncond`` u are velocities of one shape; norms are taken in fp32. At g = 1 the
    result is p itself.
    """
    if scale == 1:
        return cond
    guided = uncond + scale * (cond - uncond)
    length = torch.linalg.vector_norm(guided, dim=dim, keepdim=True, dtype=torch.float32)
    wanted = torch.linalg.vector_norm(cond, dim=dim, keepdim=True, dtype=torch.float32)
    ratio = torch.where(length > 0, wanted / length, torch.ones_like(length))
    return (guided * ratio).to(guided.dtype)


def is_guided(level: float, levels: Sequence[float], interval: Interval) -> bool:
    """Whether the step of a run over ``levels`` that asks for noise level ``level`` is in ``interval``;
    outside it cfg is 1, which needs no unconditional prediction."""
    return step_at(level, levels) in interval.steps(len(levels) - 1)
