"""The sampler: Euler steps along the velocity."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, int], None]


def euler(velocity: Velocity, latents: Tensor, levels: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Walk ``latents`` from noise level ``levels[0]`` to ``levels[-1]``.

    ``velocity(latents, sigma)`` gets sigma as a scalar tensor. Latents keep their dtype, as in the
    reference. ``on_step(done, total)`` is called after each step; it may raise to cancel.
    """
    total = len(levels) - 1
    for step in range(total):
        slope = velocity(latents, levels[step])
        latents = (latents.float() + (levels[step + 1] - levels[step]) * slope.float()).to(latents.dtype)
        if on_step is not None:
            on_step(step + 1, total)
    return latents
