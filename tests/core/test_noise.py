"""Noise between that of two seeds."""

from __future__ import annotations

import math

import pytest
import torch

from lens_core.errors import SettingError
from lens_core.sampling import reference_noise, slerp


def noise(seed: int) -> torch.Tensor:
    return reference_noise(seed, 2, 64, 128, torch.bfloat16, "cpu")


def test_the_ends_are_the_seeds_own_bit_for_bit():
    assert slerp(noise(1), noise(2), 0.0).equal(noise(1))
    assert slerp(noise(1), noise(2), 1.0).equal(noise(2))


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
def test_between_them_it_is_still_noise(strength: float):
    """Standard normal, where a straight line's deviation would be down to 0.71; each picture on its own."""
    start, end = noise(1).float(), noise(2).float()
    mixed = slerp(start, end, strength)
    # 8192 numbers a picture: the deviation's own error is 0.8 %.
    assert mixed.flatten(1).std(1).tolist() == pytest.approx([1, 1], abs=0.03)
    assert torch.equal(mixed[1:], slerp(start[1:], end[1:], strength))
    angle = torch.cosine_similarity(start.flatten(1), mixed.flatten(1)).acos()
    whole = torch.cosine_similarity(start.flatten(1), end.flatten(1)).acos()
    # The two noises' own lengths differ by 1 %, and so do their shares.
    torch.testing.assert_close(angle / whole, torch.full((2,), strength), rtol=0, atol=0.01)


def test_of_one_direction():
    """Noise with itself, which has no angle."""
    start = noise(1).float()
    torch.testing.assert_close(slerp(start, start.clone(), 0.5), start)
    assert slerp(torch.zeros(1, 8), torch.zeros(1, 8), 0.5).equal(torch.zeros(1, 8))


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_strengths_outside_are_refused(strength: float):
    with pytest.raises(SettingError, match=f"between 0 and 1, got {strength}"):
        slerp(noise(1), noise(2), strength)
