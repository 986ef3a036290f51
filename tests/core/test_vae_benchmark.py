"""The ways of enlarging, and of attention, that the VAE's benchmark compares are the same function."""

from __future__ import annotations

import pytest
import torch

from benchmarks import vae_attention as attention
from benchmarks import vae_upsample as upsample
from tests.compare import relative_l2

# Sums of up to four weights in another order, in fp64.
EXACT = 1e-14


@pytest.mark.parametrize("size", [(1, 1), (5, 3)])
@pytest.mark.parametrize("way", [upsample.at_once, upsample.one_by_one])
def test_enlarging_by_four_small_convolutions(way, size):
    x, weight = torch.randn(2, 6, *size).double(), torch.randn(4, 6, 3, 3).double()
    assert relative_l2(way(x, upsample.folded(weight)), upsample.doubled(x, weight)) < EXACT


def test_attention_by_products_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "SCORES", 4 * 9)  # 4 of 9 queries at a time
    query, key, value = torch.randn(3, 1, 1, 9, 8).double()
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert relative_l2(attention.by_products(query, key, value), want) < EXACT
