"""The noise levels: published values of mu, diffusers' scheduler, partial runs and bad settings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lens_core.errors import SettingError
from lens_core.sampling import empirical_mu, partial_sigmas, sigmas

TOKENS_1024 = 64 * 64
TOKENS_2_TO_1 = 92 * 46  # 1472 x 736
TOKENS_1440 = 90 * 90


@pytest.mark.parametrize(
    ("tokens", "steps", "mu"),
    [
        (TOKENS_1024, 4, 2.291),
        (TOKENS_1024, 20, 2.198),
        (TOKENS_1024, 50, 2.023),
        (TOKENS_2_TO_1, 4, 2.303),
        (TOKENS_2_TO_1, 20, 2.210),
        (TOKENS_2_TO_1, 50, 2.038),
        (TOKENS_1440, 4, 1.828),
        (TOKENS_1440, 20, 1.828),
        (TOKENS_1440, 50, 1.828),
    ],
)
def test_mu_has_the_published_value(tokens: int, steps: int, mu: float):
    # The published values have three decimals.
    assert empirical_mu(tokens, steps) == pytest.approx(mu, abs=1e-3)


def test_mu_depends_on_the_steps_up_to_4300_tokens_only():
    assert empirical_mu(4300, 4) != empirical_mu(4300, 20)
    assert empirical_mu(4301, 4) == empirical_mu(4301, 20)


def test_mu_lies_on_the_two_fitted_lines_at_10_and_200_steps():
    # Exact but for fp64 rounding.
    assert empirical_mu(1000, 10) == pytest.approx(8.73809524e-05 * 1000 + 1.89833333, abs=1e-12)
    assert empirical_mu(1000, 200) == pytest.approx(0.00016927 * 1000 + 0.45666666, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize("tokens", [2, 968, TOKENS_1024, TOKENS_2_TO_1, 4300, 4301, TOKENS_1440])
def test_sigmas_equal_those_of_diffusers_scheduler(tokens: int, steps: int):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=empirical_mu(tokens, steps))
    # diffusers computes in fp32, whose steps below 1 are 6e-8, and divides twice.
    assert (sigmas(steps, tokens) - scheduler.sigmas).abs().max() < 1e-6


def test_sigmas_follow_the_formula():
    levels = sigmas(4, TOKENS_1024)
    shift = math.exp(empirical_mu(TOKENS_1024, 4))
    want = [shift / (shift + 1 / t - 1) for t in (1, 0.75, 0.5, 0.25)]
    # fp32's rounding of numbers up to 1.
    assert levels.tolist() == pytest.approx([*want, 0], abs=1e-7)


@pytest.mark.parametrize("steps", [1, 4, 20, 50, 200])
def test_sigmas_fall_from_exactly_1_to_exactly_0(steps: int):
    levels = sigmas(steps, TOKENS_1024)
    assert levels.dtype == torch.float32
    assert levels.shape == (steps + 1,)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()


def test_denoise_1_is_a_whole_run():
    assert torch.equal(partial_sigmas(20, TOKENS_1024, 1.0), sigmas(20, TOKENS_1024))


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_denoise_half_is_the_last_half_of_twice_the_steps(steps: int):
    partial = partial_sigmas(steps, TOKENS_1024, 0.5)
    assert torch.equal(partial, sigmas(2 * steps, TOKENS_1024)[steps:])
    assert len(partial) == steps + 1


def test_a_fraction_that_does_not_divide_rounds_the_longer_run_down():
    # 10 / 0.3 = 33.3: 33 steps are made, as ComfyUI counts.
    assert torch.equal(partial_sigmas(10, TOKENS_1024, 0.3), sigmas(33, TOKENS_1024)[-11:])


def test_denoise_0_runs_nothing():
    assert len(partial_sigmas(20, TOKENS_1024, 0.0)) == 0


LEVELS = [(20, 0.5), (4, 0.5), (4, 0.3), (50, 0.9), (1, 0.25), (1000, 0.99), (20, 1e-9)]


@pytest.mark.parametrize("tokens", [1024, TOKENS_1024, 8100])
@pytest.mark.parametrize("steps, level", LEVELS)
def test_denoise_by_noise_level_starts_at_the_nearest_step_of_a_longer_run(steps, level, tokens):
    """All of ``steps`` run, and no run of one step more or less begins nearer to the level."""
    levels = partial_sigmas(steps, tokens, level, "noise level")
    assert len(levels) == steps + 1 and (levels.diff() < 0).all() and levels[-1] == 0
    longest = min(20 * steps, 5000)
    starts = torch.stack(
        [sigmas(total, tokens)[-(steps + 1)] for total in range(steps, longest, 1 + steps // 20)]
    )
    # fp32's rounding of what is compared.
    assert abs(levels[0] - level) <= (starts - level).abs().min() + 1e-7
    if 20 <= steps < 1000:
        assert levels[0] == pytest.approx(level, abs=0.01)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_denoise_by_noise_level_is_a_whole_run_at_1_and_none_at_0(steps: int):
    assert torch.equal(partial_sigmas(steps, TOKENS_1024, 1.0, "noise level"), sigmas(steps, TOKENS_1024))
    assert len(partial_sigmas(steps, TOKENS_1024, 0.0, "noise level")) == 0


def test_the_ways_to_count_differ_as_the_tooltip_says():
    by_steps, by_level = (partial_sigmas(20, TOKENS_1024, 0.5, by)[0] for by in ("steps", "noise level"))
    assert by_steps == pytest.approx(0.89, abs=0.005) and by_level == pytest.approx(0.5, abs=0.005)


def test_an_unknown_way_to_count_is_refused():
    with pytest.raises(SettingError, match="one of steps, noise level, got 'sigma'"):
        partial_sigmas(20, TOKENS_1024, 0.5, "sigma")


@pytest.mark.parametrize("steps", [0, -3])
def test_less_than_one_step_is_refused_with_the_number(steps: int):
    with pytest.raises(SettingError, match=rf"at least 1, got {steps}\b"):
        sigmas(steps, TOKENS_1024)
    with pytest.raises(SettingError, match=rf"at least 1, got {steps}\b"):
        partial_sigmas(steps, TOKENS_1024, 0.5)


@pytest.mark.parametrize("denoise", [-0.1, 1.5, float("nan")])
def test_denoise_outside_0_to_1_is_refused_with_the_number(denoise: float):
    with pytest.raises(SettingError, match=rf"between 0 and 1, got {denoise}\b"):
        partial_sigmas(20, TOKENS_1024, denoise)
