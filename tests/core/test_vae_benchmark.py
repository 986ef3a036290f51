"""The ways of enlarging that the VAE's benchmark compares are the same convolution."""

from __future__ import annotations

import pytest
import torch

from benchmarks import vae_upsample as upsample
from tests.compare import relative_l2

# Sums of up to four weights in another order, in fp64.
EXACT = 1e-14


@pytest.mark.parametrize("size", [(1, 1), (5, 3)])
@pytest.mark.parametrize("way", [upsample.at_once, upsample.one_by_one])
def test_enlarging_by_four_small_convolutions(way, size):
    x, weight = torch.randn(2, 6, *size).double(), torch.randn(4, 6, 3, 3).double()
    assert relative_l2(way(x, upsample.folded(weight)), upsample.doubled(x, weight)) < EXACT
