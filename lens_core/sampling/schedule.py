"""The noise levels of a run.

Lens uses FLUX.2's empirical shift: mu grows with the number of image tokens and, below 4301 of
them, also depends on the number of steps (two lines fitted at 10 and 200 steps, read at ``steps``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SettingError

_A10, _B10 = 8.73809524e-05, 1.89833333
_A200, _B200 = 0.00016927, 0.45666666
_LARGE = 4300


def empirical_mu(tokens: int, steps: int) -> float:
    """Shift of the schedule for ``tokens`` = h * w image tokens and ``steps`` steps."""
    at_200 = _A200 * tokens + _B200
    if tokens > _LARGE:
        return at_200
    at_10 = _A10 * tokens + _B10
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope


def shifted(times: Tensor, mu: float) -> Tensor:
    """Noise levels e^mu / (e^mu + 1/t - 1) of times t in [0, 1]; 0 at t = 0."""
    shift = math.exp(mu)
    return shift / (shift + 1 / times - 1)


def sigmas(steps: int, tokens: int) -> Tensor:
    """Noise levels [steps + 1] in fp32, from 1 down to a final 0: ``shifted``, of ``steps`` even times from 1
    to 1/steps."""
    _check_steps(steps)
    times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    levels = shifted(times, empirical_mu(tokens, steps))
    return torch.cat([levels, levels.new_zeros(1)]).float()


def partial_sigmas(steps: int, tokens: int, denoise: float) -> Tensor:
    """The last ``steps`` of a longer run that starts from a picture, as ComfyUI's samplers count.

    ``denoise`` 1 is a whole run; at 0.5 the schedule of twice the steps is made and its first half
    left out; at 0 nothing runs and the result is empty.
    """
    if not 0 <= denoise <= 1:
        raise SettingError(f"denoise must be between 0 and 1, got {denoise}.")
    _check_steps(steps)
    if denoise == 0:
        return torch.zeros(0)
    return sigmas(int(steps / denoise), tokens)[-(steps + 1) :]


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise SettingError(f"The number of steps must be at least 1, got {steps}.")
