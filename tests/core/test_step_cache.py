"""Step skipping: when it may skip, what it puts in place of the blocks, and whose residuals it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core.denoiser import STEP_CACHE_OFF, DenoiserRun, LensDenoiser, StepCache, StepCacheOptions
from lens_core.denoiser.block import run_blocks
from lens_core.errors import SettingError
from lens_core.interval import WHOLE, Interval
from lens_core.sampling import sigmas

GRID = (5, 3)
TOKENS = GRID[0] * GRID[1]
ALWAYS = 1e30
# Below any change of two different steps, and above 0, which is off.
NEVER = 1e-30


def options(threshold: float = ALWAYS, interval: Interval = WHOLE, in_a_row: int = 1000) -> StepCacheOptions:
    return StepCacheOptions(threshold, interval, in_a_row)


# With the tiny denoiser


@pytest.fixture
def ran(denoiser: LensDenoiser) -> list[int]:
    """The index of every block that runs."""
    seen: list[int] = []
    for index, block in enumerate(denoiser.transformer_blocks):
        block.register_forward_hook(lambda *_, index=index: seen.append(index))
    return seen


def walk(denoiser: LensDenoiser, cache: StepCache | None, levels: Sequence[float], text: Tensor) -> Tensor:
    """Velocities [steps, N, C] along a slowly changing path; the text has the same on all calls."""
    generator = torch.Generator().manual_seed(1)
    start, towards = (torch.randn(1, TOKENS, 128, generator=generator) for _ in range(2))
    run = DenoiserRun(levels[:-1], cache=cache)
    out = [
        denoiser(start + (1 - level) * towards, torch.tensor([level]), text, GRID, run=run, entry="a")
        for level in levels[:-1]
    ]
    return torch.cat(out)


def features(tokens: int) -> Tensor:
    return torch.randn(1, tokens, 4, 64)


def full_steps(ran: list[int]) -> list[bool]:
    """Of every forward of three blocks, whether it ran them all."""
    text = "".join(map(str, ran))
    assert text.replace("012", "").strip("0") == "", text
    return [part == "12" for part in text.split("0")[1:]]


@pytest.mark.parametrize("tokens", [0, 9])
def test_a_cache_that_never_skips_changes_no_bit(denoiser: LensDenoiser, ran: list[int], tokens: int):
    """The text stream after block 0 goes on into block 1."""
    levels, text = sigmas(6, TOKENS).tolist(), features(tokens)
    without = walk(denoiser, None, levels, text)
    cache = StepCache(options(NEVER), levels)
    assert torch.equal(walk(denoiser, cache, levels, text), without)
    assert (cache.skipped, cache.forwards) == (0, 6)
    assert full_steps(ran) == 12 * [True]


@pytest.mark.parametrize(
    ("interval", "computed"),
    [
        (WHOLE, [0, 9]),
        (Interval(0.1, 1.0), [0, 9]),
        (Interval(0.2, 1.0), [0, 1, 9]),
        (Interval(0.3, 0.7), [0, 1, 2, 7, 8, 9]),
        (Interval(0.5, 0.5), range(10)),
    ],
)
def test_a_huge_threshold_skips_exactly_what_is_allowed(
    denoiser: LensDenoiser, ran: list[int], interval: Interval, computed: Iterable[int]
):
    levels, text = sigmas(10, TOKENS).tolist(), features(9)
    cache = StepCache(options(interval=interval), levels)
    walk(denoiser, cache, levels, text)
    wanted = [step in computed for step in range(10)]
    assert full_steps(ran) == wanted
    assert (cache.skipped, cache.forwards) == (10 - sum(wanted), 10)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_one_or_two_steps_has_none_to_skip(denoiser: LensDenoiser, ran: list[int], steps: int):
    levels = sigmas(steps, TOKENS).tolist()
    walk(denoiser, StepCache(options(), levels), levels, features(9))
    assert full_steps(ran) == steps * [True]


@pytest.mark.parametrize("in_a_row", [1, 2, 3])
def test_after_so_many_in_a_row_one_is_computed(denoiser: LensDenoiser, ran: list[int], in_a_row: int):
    levels = sigmas(12, TOKENS).tolist()
    walk(denoiser, StepCache(options(in_a_row=in_a_row), levels), levels, features(9))
    assert full_steps(ran) == [step % (in_a_row + 1) == 0 or step == 11 for step in range(12)]


@pytest.mark.parametrize("tokens", [0, 9])
def test_a_skipped_step_adds_what_the_other_blocks_added_before(
    denoiser: LensDenoiser, monkeypatch: pytest.MonkeyPatch, tokens: int
):
    """By the streams before, after block 0 and after all blocks, noted in runs without a cache."""
    levels, text = [1.0, 0.6, 0.0], features(tokens)
    notes: list[Tensor] = []

    def noting(blocks: Sequence[Any], streams: Sequence[Tensor], tables: Sequence, shared: Any) -> list:
        first = run_blocks(blocks[:1], streams, tables[:1], shared)
        out = run_blocks(blocks[1:], first, tables[1:], shared)
        notes.extend([first[0], out[0]])
        return out

    with monkeypatch.context() as patch:
        patch.setattr("lens_core.denoiser.run.run_blocks", noting)
        walk(denoiser, None, levels, text)
    first_before, last_before, first_now, _ = notes
    ends: list[Tensor] = []
    denoiser.norm_out.register_forward_pre_hook(lambda _, args: ends.append(args[0]))
    # Three levels are two steps, which are never skipped: the schedule of the cache is a longer one.
    walk(denoiser, StepCache(options(), [1.0, 0.6, 0.3, 0.0]), levels, text)
    assert torch.equal(ends[1], first_now + (last_before - first_before))
    assert not torch.equal(ends[1], notes[3]), "it was not skipped"


def test_off_is_no_cache_at_all():
    levels = sigmas(4, TOKENS).tolist()
    assert StepCache.of(STEP_CACHE_OFF, levels) is None
    assert StepCache.of(StepCacheOptions(), levels) is None
    assert StepCache.of(options(NEVER), levels) is not None


def test_gradients_are_never_cut_off(denoiser: LensDenoiser):
    levels, text = sigmas(10, TOKENS).tolist(), features(9)
    cache = StepCache(options(), levels)
    with torch.inference_mode(False), torch.enable_grad():
        trained = LensDenoiser(denoiser.config)
        velocities = walk(trained, cache, levels, text.clone())
        velocities[3].sum().backward()
    gradient = trained.transformer_blocks[2].img_mlp.w2.weight.grad
    assert gradient is not None and gradient.any()
    assert cache.skipped == 0


# With blocks that add a number each


class Toy:
    """A denoiser of two blocks: the first adds a given number to the image stream, the other ten."""

    def __init__(self) -> None:
        self.first = 0.0
        self.ran: list[str] = []

    def _run(
        self, blocks: Sequence[str], streams: Sequence[Tensor], tables: Any, shared: Any
    ) -> list[Tensor]:
        self.ran.extend(blocks)
        return [streams[0] + (self.first if blocks[0] == "first" else 10), *streams[1:]]

    def __call__(
        self,
        cache: StepCache,
        level: float | Tensor,
        first: float,
        entry: Any = "a",
        shape: tuple[int, ...] = (1, 4, 2),
        dtype: torch.dtype = torch.float64,
        text: int | None = None,
    ) -> bool:
        """Run a forward whose block 0 adds ``first``; whether the other block was left out."""
        self.first = first
        self.ran.clear()
        streams = [torch.zeros(shape, dtype=dtype)]
        if text is not None:
            streams.append(torch.zeros(shape[0], text, shape[2], dtype=dtype))
        sigma = torch.as_tensor(level).expand(shape[0])
        (image, *_) = cache.through(entry, sigma, self._run)(["first", "rest"], streams, [None, None], None)
        assert image.shape == shape and image.dtype == dtype
        assert self.ran in (["first", "rest"], ["first"])
        return len(self.ran) == 1


@pytest.fixture
def toy() -> Toy:
    return Toy()


LEVELS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]


def skips(toy: Toy, cache: StepCache, firsts: Sequence[float], **changes: Any) -> list[bool]:
    """One forward a level, with these parts of block 0."""
    return [toy(cache, level, first, **changes) for level, first in zip(LEVELS, firsts, strict=False)]


def test_the_threshold_is_the_relative_change_of_block_0s_part(toy: Toy):
    for first, skipped in ((1.099, True), (1.101, False), (0.901, True), (0.899, False), (1.1, False)):
        assert skips(toy, StepCache(options(0.1), LEVELS), [1.0, first]) == [False, skipped]
        # Of ten times the size, ten times the change.
        assert skips(toy, StepCache(options(0.1), LEVELS), [10.0, 10 * first]) == [False, skipped]


def test_the_change_is_a_mean_over_all_numbers():
    """One of eight that changes by 0.72 is a change of 0.09."""
    parts: Iterator[Tensor]

    def run(blocks: Sequence, streams: Sequence[Tensor], *_: Any) -> list[Tensor]:
        return [streams[0] + (next(parts) if blocks[0] == "first" else 5.0)]

    for change, skipped in ((0.72, 1), (0.88, 0)):
        changed = torch.ones(1, 4, 2)
        changed[0, 2, 1] += change
        parts = iter([torch.ones(1, 4, 2), changed])
        cache = StepCache(options(0.1), LEVELS)
        for level in LEVELS[:2]:
            through = cache.through("a", torch.tensor([level]), run)
            through(["first", "rest"], [torch.zeros(1, 4, 2)], [0, 0], None)
        assert cache.skipped == skipped


def test_the_comparison_is_with_the_last_step_computed_in_full(toy: Toy):
    """Not with the last step: slow drift adds up until it is noticed."""
    firsts = [1.0, 1.04, 1.08, 1.12, 1.16, 1.2, 1.24]
    assert skips(toy, StepCache(options(0.1), LEVELS), firsts) == [0, 1, 1, 0, 1, 1, 0]


def test_a_change_of_nothing_to_something_is_computed(toy: Toy):
    assert skips(toy, StepCache(options(), LEVELS), [0.0, 0.0, 1.0, float("nan"), 1.0]) == 5 * [False]


def test_entries_do_not_mix(toy: Toy):
    """Interleaved entries, each constant, all different: every one skips by its own residuals."""
    cache = StepCache(options(0.1), LEVELS)
    entries: list[dict[str, Any]] = [
        {"entry": "a"},
        {"entry": "b"},
        {"entry": ("a", "b"), "shape": (2, 4, 2)},
        {"entry": "a", "shape": (2, 4, 2)},
        {"entry": "a", "shape": (1, 8, 2)},
        {"entry": "a", "text": 3},
        {"entry": "a", "text": 4},
        {"entry": "a", "dtype": torch.float32},
    ]
    for step, level in enumerate(LEVELS[:-2]):
        for number, entry in enumerate(entries):
            assert toy(cache, level, 2.0**number, **entry) == (step > 0), (step, entry)


def test_an_entry_that_joins_later_is_computed_first(toy: Toy):
    cache = StepCache(options(), LEVELS)
    assert [toy(cache, level, 1.0, entry="a") for level in LEVELS[:3]] == [False, True, True]
    assert [toy(cache, level, 1.0, entry="b") for level in LEVELS[3:6]] == [False, True, True]


def test_levels_between_those_of_the_schedule_are_computed_and_kept(toy: Toy):
    """Midpoints of a second-order sampler; the next level is compared with the midpoint's."""
    cache = StepCache(options(0.1), LEVELS)
    asked = [(1.0, 1.0), (0.95, 1.2), (0.9, 1.25), (0.85, 1.25), (0.8, 1.4), (0.75, 1.4), (0.7, 1.4)]
    assert [toy(cache, level, first) for level, first in asked] == [0, 0, 1, 0, 0, 0, 1]


def test_the_first_step_is_computed_even_after_a_level_above_it(toy: Toy):
    cache = StepCache(options(), LEVELS)
    assert [toy(cache, level, 1.0) for level in (1.5, 1.0, 0.9)] == [False, False, True]


def test_a_level_computed_anew_by_the_sampler_is_still_of_the_schedule(toy: Toy):
    cache = StepCache(options(), LEVELS)
    assert [toy(cache, level * (1 + 2e-6), 1.0) for level in LEVELS[:3]] == [False, True, True]


@pytest.mark.parametrize("again", [0.8, 0.85, 1.0], ids=["same", "between", "start"])
def test_nothing_is_skipped_once_a_level_does_not_fall(toy: Toy, again: float):
    """Heun's second evaluation, a restart, another picture; other entries go on."""
    cache = StepCache(options(), LEVELS)
    for level in (1.0, 0.9, 0.8):
        toy(cache, level, 1.0, entry="a")
        toy(cache, level, 1.0, entry="b")
    assert cache.skipped == 4 and cache.hindrance is None
    assert not toy(cache, again, 1.0, entry="a")
    assert [toy(cache, level, 1.0, entry="a") for level in (0.7, 0.6, 0.5)] == 3 * [False]
    assert [toy(cache, level, 1.0, entry="b") for level in (0.7, 0.6, 0.5)] == 3 * [True]
    assert "noise level again" in cache.summary(48)


def test_pictures_at_different_levels_are_computed(toy: Toy):
    cache = StepCache(options(), LEVELS)
    for levels in ([0.95, 0.9], [0.8, 0.7], [0.6, 0.5]):
        assert not toy(cache, torch.tensor(levels), 1.0, shape=(2, 4, 2))
    assert not toy(cache, 0.4, 1.0, shape=(2, 4, 2))


def test_a_rising_schedule_is_computed(toy: Toy):
    """Noise put back into a picture, step by step."""
    cache = StepCache(options(), LEVELS[::-1])
    assert [toy(cache, level, 1.0) for level in LEVELS[::-1]] == 11 * [False]


def test_the_summary_counts_forwards(toy: Toy):
    cache = StepCache(options(), LEVELS)
    skips(toy, cache, 10 * [1.0])
    assert cache.summary(48) == "8 of 10 forwards skipped 47 of 48 blocks"
    cache.hinder("a reason")
    assert cache.summary(48) == "8 of 11 forwards skipped 47 of 48 blocks (a reason)"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: StepCacheOptions(-0.1), r"threshold must be 0 \(off\) or a positive number, got -0.1"),
        (lambda: StepCacheOptions(float("nan")), "got nan"),
        (lambda: StepCacheOptions(float("inf")), "got inf"),
        (lambda: StepCacheOptions(0.1, max_consecutive=0), "At least 1 step in a row .* got 0"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value(make: Callable[[], Any], said: str):
    with pytest.raises(SettingError, match=said):
        make()
