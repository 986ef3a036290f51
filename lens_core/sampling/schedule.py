"""The noise levels of a run.

Lens uses FLUX.2's empirical shift: mu grows with the number of image tokens and, below 4301 of
them, also depends on the number of steps (two lines fitted at 10 and 200 steps, read at ``steps``).
"""

from __future__ import annotations

import bisect
import math

import torch
from torch import Tensor

from ..errors import SettingError

_A10, _B10 = 8.73809524e-05, 1.89833333
_A200, _B200 = 0.00016927, 0.45666666
_LARGE = 4300
# What a ``denoise`` between 0 and 1 is a share of.
BY_STEPS, BY_LEVEL = "steps", "noise level"
DENOISE_BY = (BY_STEPS, BY_LEVEL)


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
    return _end_of_run(steps, steps, tokens)


def partial_sigmas(steps: int, tokens: int, denoise: float, denoise_by: str = BY_STEPS) -> Tensor:
    """The last ``steps`` of a longer run that starts from a picture; fp32, [steps + 1].

    ``denoise`` 1 is a whole run; at 0 nothing runs and the result is empty. Between, it is the share of the
    longer run's steps (``BY_STEPS``, as ComfyUI's samplers count: at 0.5 the second half of twice the steps),
    or the noise level that is started from (``BY_LEVEL``): the longer run is the one whose level there is
    nearest. The shift makes these differ: half the steps of 20 at 1024 x 1024 begin at level 0.89.
    """
    if not 0 <= denoise <= 1:
        raise SettingError(f"denoise must be between 0 and 1, got {denoise}.")
    if denoise_by not in DENOISE_BY:
        raise SettingError(f"denoise_by must be one of {', '.join(DENOISE_BY)}, got {denoise_by!r}.")
    _check_steps(steps)
    if denoise == 0:
        return torch.zeros(0)
    total = int(steps / denoise) if denoise_by == BY_STEPS else _run_through(denoise, steps, tokens)
    return _end_of_run(steps, total, tokens)


def _run_through(level: float, steps: int, tokens: int) -> int:
    """Number of steps of the run that is nearest to noise level ``level``, ``steps`` before its end."""

    def start(total: int) -> float:
        time = torch.tensor(steps / total, dtype=torch.float64)
        return shifted(time, empirical_mu(tokens, total)).item()

    longest = steps
    while start(longest) > level:
        longest *= 2
    # The longer the run, the lower its level there.
    passed = bisect.bisect_left(range(longest), -level, lo=steps + 1, key=lambda total: -start(total))
    return min(passed - 1, passed, key=lambda total: abs(start(total) - level))


def _end_of_run(steps: int, total: int, tokens: int) -> Tensor:
    """Noise levels [steps + 1] of the last ``steps`` of ``total`` in fp32."""
    times = torch.linspace(steps / total, 1 / total, steps, dtype=torch.float64)
    levels = shifted(times, empirical_mu(tokens, total))
    return torch.cat([levels, levels.new_zeros(1)]).float()


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise SettingError(f"The number of steps must be at least 1, got {steps}.")
