"""Step skipping by first-block cache: where block 0 adds what it added before, the others are left out.

From one step to the next most of what the blocks add to the image stream hardly changes. Block 0 always
runs. If what it adds differs little from what it added when the entry was last computed in full, the sum
of all that the other blocks added then is added again in their place. An approximation, off by default.

Two rules keep it from reusing what it must not, whatever the sampler does:

- Only levels of the run's schedule are skipped, never its first or last. What lies between two levels (the
  midpoints of dpm_2, dpmpp_2s, dpmpp_sde) is computed in full; it is the better base for what follows.
- Levels of an entry must fall. Once one comes again or lies above the one before it (heun, which wants
  the difference of two evaluations of a level that a cache would hide; a restart; another picture under the
  same name), nothing more of that entry is skipped in the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..errors import SettingError
from ..interval import Interval
from .block import LensBlock, Shared, Tables

# ``block.run_blocks``, or what does the same faster.
RunBlocks = Callable[[Sequence[LensBlock], Sequence[Tensor], Sequence[Tables], Shared], list[Tensor]]
# Offered where a threshold must be named. Not measured on trained weights.
DEFAULT_THRESHOLD = 0.1
# The first steps lay out the picture; whatever is lost there is lost.
_AFTER_COMPOSITION = Interval(0.1, 1.0)
# Levels are fp32, and some samplers compute them anew.
_SAME_LEVEL = 1e-5
_NOT_FALLING = "the sampler asks for a noise level again, as second-order samplers do"


@dataclass(frozen=True)
class StepCacheOptions:
    """When steps are skipped; by default never.

    ``threshold``: the largest change, mean |r - r'| / mean |r'| of what block 0 adds; 0 skips nothing.
    ``interval``: the steps that may be skipped, but the first and the last never are.
    ``max_consecutive``: after so many skipped in a row, one is computed.
    """

    threshold: float = 0.0
    interval: Interval = _AFTER_COMPOSITION
    max_consecutive: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise SettingError(
                f"The step cache's threshold must be 0 (off) or a positive number, got {self.threshold}."
            )
        if self.max_consecutive < 1:
            raise SettingError(
                f"At least 1 step in a row must be allowed to be skipped, got {self.max_consecutive}. "
                "To skip none, set the threshold to 0."
            )


STEP_CACHE_OFF = StepCacheOptions()


@dataclass
class _Entry:
    """One conditioning entry: its last level, and what the blocks added when it was last computed in full.

    ``first`` is block 0's part, ``rest`` that of all others; [B, N, H] each.
    """

    level: float
    first: Tensor
    rest: Tensor
    in_a_row: int = 0
    falling: bool = True


class StepCache:
    """The kept residuals of one run, by conditioning entry, and how many forwards were skipped."""

    def __init__(self, options: StepCacheOptions, levels: Sequence[float]) -> None:
        """``levels`` are the run's noise levels, steps + 1 of them."""
        last = len(levels) - 2
        self._options = options
        self._allowed = [levels[step] for step in options.interval.steps(len(levels) - 1) if 0 < step < last]
        self._entries: dict[Hashable, _Entry] = {}
        self.forwards = 0
        self.skipped = 0
        self.hindrance: str | None = None

    @classmethod
    def of(cls, options: StepCacheOptions, levels: Sequence[float]) -> StepCache | None:
        """The cache of a run over ``levels``; None if it is off."""
        return cls(options, levels) if options.threshold else None

    def through(self, entry: Hashable, sigma: Tensor, run_blocks: RunBlocks) -> RunBlocks:
        """What stands in for ``run_blocks`` in a forward of ``entry`` at noise level sigma [B].

        ``entry`` names what is denoised under what conditioning; other shapes are other entries.
        """
        return partial(self._run, entry, sigma, run_blocks)

    def hinder(self, reason: str) -> None:
        """Note a forward that was computed in full without the cache, and why."""
        self.forwards += 1
        self.hindrance = reason

    def summary(self, blocks: int) -> str:
        """What was skipped, of ``blocks`` blocks a forward, and what hindered it."""
        text = f"{self.skipped} of {self.forwards} forwards skipped {blocks - 1} of {blocks} blocks"
        return text if self.hindrance is None else f"{text} ({self.hindrance})"

    def _run(
        self,
        entry: Hashable,
        sigma: Tensor,
        run_blocks: RunBlocks,
        blocks: Sequence[LensBlock],
        streams: Sequence[Tensor],
        tables: Sequence[Tables],
        shared: Shared,
    ) -> list[Tensor]:
        self.forwards += 1
        key = (entry, *(x.shape for x in streams), streams[0].dtype, streams[0].device)
        known, level = self._entries.get(key), _level(sigma)
        after = run_blocks(blocks[:1], streams, tables[:1], shared)
        image = after[0]
        if image.requires_grad:  # a training node: every block's gradient is wanted, and none may be kept
            return run_blocks(blocks[1:], after, tables[1:], shared)
        first = image - streams[0]
        if known is not None and self._may_skip(known, level) and self._close(first, known.first):
            self.skipped += 1
            known.level, known.in_a_row = level, known.in_a_row + 1
            return [image + known.rest]
        out = run_blocks(blocks[1:], after, tables[1:], shared)
        falling = known is None or known.falling
        self._entries[key] = _Entry(level, first, out[0] - image, falling=falling)
        return out

    def _may_skip(self, known: _Entry, level: float) -> bool:
        if not level < known.level:
            known.falling = False
            self.hindrance = _NOT_FALLING
        return (
            known.falling
            and known.in_a_row < self._options.max_consecutive
            and any(math.isclose(level, allowed, rel_tol=_SAME_LEVEL) for allowed in self._allowed)
        )

    def _close(self, now: Tensor, before: Tensor) -> bool:
        """Whether the relative change is below the threshold; waits for the device to say so."""
        change = (now - before).abs().float().mean() / before.abs().float().mean()
        return bool(change < self._options.threshold)


def _level(sigma: Tensor) -> float:
    """The noise level of all pictures of sigma [B]; NaN, which falls below nothing, if they differ."""
    levels = set(sigma.tolist())
    return levels.pop() if len(levels) == 1 else math.nan
