"""Parts of a sampling run, in shares of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import SettingError

# Shares are written in decimals, levels pass through fp32: both may miss their mark by this much. Levels
# of a thousand steps lie 1e-4 apart.
_CLOSE = 1e-6


@dataclass(frozen=True)
class Interval:
    """The steps whose index, divided by the number of steps, lies in [start, end)."""

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise SettingError(
                "A part of the steps needs 0 <= start <= end <= 1, got start "
                f"{self.start:g} and end {self.end:g}. Give shares of the steps in this order."
            )

    @property
    def whole(self) -> bool:
        """Whether it is every step of any run."""
        return (self.start, self.end) == (0, 1)

    def steps(self, count: int) -> range:
        """Which of ``count`` steps belong to it."""
        first, end = (math.ceil(share * count - _CLOSE) for share in (self.start, self.end))
        return range(first, end)


WHOLE = Interval()


def step_at(level: float, levels: Sequence[float]) -> int:
    """The step of a run over ``levels`` (steps + 1 of them, falling or rising) that asks for ``level``.

    A level between two of them belongs to the step that leads from one to the other.
    """
    sign = 1 if levels[0] >= levels[-1] else -1
    passed = sum(sign * (known - level) >= -_CLOSE for known in levels[:-1])
    return max(passed - 1, 0)
