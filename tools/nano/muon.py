"""Muon for recorded training steps: momentum made orthogonal, all matrices of one shape at once.

The formula is torch.optim.Muon's with ``match_rms_adamw`` (arXiv 2502.16982), so AdamW's learning rate
serves both; that class reads its rate on the CPU, where a CUDA graph would keep the first one for ever, and
takes one small matrix after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95


def by(indices: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """``indices`` that have the same ``key``, together."""
    found: dict[Hashable, list[int]] = {}
    for index in indices:
        found.setdefault(key(index), []).append(index)
    return list(found.values())


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, R, C] with all singular values brought near 1 by Newton-Schulz iterations, in bf16."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Updates matrices in place; ``rate`` is a tensor, read on its device at every step."""

    def __init__(self, values: Sequence[Tensor], rate: Tensor, decay: float) -> None:
        self.values, self.rate, self.decay = list(values), rate, decay
        self.momenta = [torch.zeros_like(value) for value in self.values]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """``gradients`` of all values, in their order."""
        torch._foreach_lerp_(self.momenta, list(gradients), 1 - _MOMENTUM)
        ahead = torch._foreach_lerp(list(gradients), self.momenta, _MOMENTUM)
        for indices in by(range(len(self.values)), lambda index: self.values[index].shape):
            direction = orthogonal(torch.stack([ahead[index] for index in indices]))
            size = 0.2 * max(direction.shape[-2:]) ** 0.5
            for index, part in zip(indices, direction, strict=True):
                value = self.values[index]
                value.sub_(self.rate * (size * part + self.decay * value))
