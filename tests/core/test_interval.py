"""Parts of a run: which steps they are, and which step asks for a noise level."""

from __future__ import annotations

import pytest

from lens_core.errors import SettingError
from lens_core.interval import WHOLE, Interval, step_at
from lens_core.sampling import is_guided, sigmas


@pytest.mark.parametrize(
    ("start", "end", "count", "steps"),
    [
        (0.0, 1.0, 5, [0, 1, 2, 3, 4]),
        (0.1, 1.0, 20, range(2, 20)),
        (0.2, 0.8, 10, range(2, 8)),
        (0.21, 0.8, 10, range(3, 8)),
        (0.2, 0.81, 10, range(2, 9)),
        (0.0, 0.0, 4, []),
        (0.5, 0.5, 4, []),
        (0.3, 0.7, 1, []),
        (0.0, 0.3, 1, [0]),
        (1.0, 1.0, 4, []),
    ],
)
def test_a_step_belongs_where_its_index_over_their_number_does(start, end, count, steps):
    assert list(Interval(start, end).steps(count)) == list(steps)


def test_a_decimal_share_names_the_step_that_it_says():
    """Also where the product is off in its last bit: (0.1 + 0.2) * 10 is more than 3."""
    assert Interval(0.1 + 0.2, 1.0).steps(10).start == 3
    for count in range(1, 101):
        for step in range(count):
            for share in (step / count, round(step / count, 9), step / count * (1 + 2e-16)):
                assert Interval(min(share, 1.0), 1.0).steps(count).start == step


@pytest.mark.parametrize(
    ("start", "end"), [(-0.1, 1.0), (0.0, 1.1), (0.7, 0.3), (float("nan"), 1.0), (0.0, float("nan"))]
)
def test_what_is_no_part_is_refused_with_its_numbers(start: float, end: float):
    with pytest.raises(SettingError, match=rf"got start {start:g} and end {end:g}\. Give"):
        Interval(start, end)


def test_only_zero_to_one_is_whole():
    assert WHOLE.whole and Interval(0, 1).whole
    assert not Interval(0.0, 0.99).whole and not Interval(0.01, 1.0).whole


@pytest.mark.parametrize("steps", [1, 4, 20, 1000])
def test_every_level_of_a_schedule_is_its_own_step(steps: int):
    falling = sigmas(steps, 4096).tolist()
    assert [step_at(level, falling) for level in falling[:-1]] == list(range(steps))
    rising = falling[::-1]
    assert [step_at(level, rising) for level in rising[:-1]] == list(range(steps))


def test_a_level_in_between_belongs_to_the_step_that_crosses_it():
    assert [step_at(level, [1.0, 0.6, 0.3, 0.0]) for level in (0.99, 0.61, 0.45, 0.01)] == [0, 0, 1, 2]
    assert [step_at(level, [0.0, 0.3, 0.6, 1.0]) for level in (0.01, 0.45, 0.61, 0.99)] == [0, 1, 2, 2]


def test_levels_beyond_the_run_belong_to_its_ends():
    assert step_at(1.2, [1.0, 0.5, 0.2]) == 0
    assert step_at(0.1, [1.0, 0.5, 0.2]) == 1
    assert step_at(0.2, [1.0, 0.5, 0.2]) == 1, "the last level is no step"


def test_rounding_does_not_move_a_level_to_the_step_before():
    levels = sigmas(20, 4096).tolist()
    assert [step_at(level * (1 - 1e-7), levels) for level in levels[:-1]] == list(range(20))
    assert [step_at(level * (1 + 1e-7), levels) for level in levels[:-1]] == list(range(20))


def test_which_levels_are_guided():
    levels = sigmas(5, 4096).tolist()
    guided = [is_guided(level, levels, Interval(0.2, 0.6)) for level in levels[:-1]]
    assert guided == [False, True, True, False, False]
