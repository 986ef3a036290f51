"""Distances of velocities and pictures against their formulas."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import fidelity
from benchmarks.fidelity import PSNR_MAX, common_share, lpips, per_token, psnr, ssim

# fp64 throughout; SSIM's variances are differences of numbers near 1.
EXACT = 1e-9


def test_per_token_takes_mean_and_worst_over_tokens():
    want = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    got = torch.tensor([[[1.0, 0.0], [2.0, 2.0]]])
    found = per_token(got, want)
    assert found == pytest.approx(
        {
            "cosine": (1 + math.sqrt(0.5)) / 2,
            "cosine, worst": math.sqrt(0.5),
            "relative L2": 0.5,
            "relative L2, worst": 1.0,
        }
    )


def test_common_share_is_the_mean_vectors_energy():
    one = torch.randn(1, 128)
    assert common_share(one.expand(50, -1)) == pytest.approx(1)
    assert common_share(torch.cat([one, -one])) == pytest.approx(0, abs=1e-12)
    # Of 10 000 independent vectors 1 / 10 000, to 1 % by sqrt(2 / 128 / 10 000) and the total's luck.
    assert common_share(torch.randn(10_000, 128)) == pytest.approx(1e-4, rel=0.5)
    assert common_share(torch.zeros(3, 4)) == 0


def test_psnr():
    want = torch.rand(20, 30, 3)
    assert psnr(want + 0.01, want) == pytest.approx(40, abs=1e-4)  # fp32's sums
    assert psnr(want, want) == PSNR_MAX


def slow_ssim(got: Tensor, want: Tensor) -> float:
    """Wang et al. 2004, equation 13, window by window."""
    offset = torch.arange(-5.0, 6, dtype=torch.float64)
    weight = torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    weight /= weight.sum()
    values = []
    for channel in range(3):
        for y in range(got.shape[0] - 10):
            for x in range(got.shape[1] - 10):
                a, b = (image[y : y + 11, x : x + 11, channel].double() for image in (got, want))
                mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
                var_a = (weight * (a - mean_a) ** 2).sum()
                var_b = (weight * (b - mean_b) ** 2).sum()
                both = (weight * (a - mean_a) * (b - mean_b)).sum()
                top = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
                values.append(top / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    return torch.stack(values).mean().item()


def test_ssim_equals_its_definition():
    want = torch.rand(15, 18, 3)
    got = (want + 0.2 * torch.randn(15, 18, 3)).clamp(0, 1)
    assert ssim(got, want) == pytest.approx(slow_ssim(got, want), abs=EXACT)
    assert 0.1 < ssim(got, want) < 0.97
    assert ssim(want, want) == pytest.approx(1, abs=EXACT)
    assert ssim(1 - want, want) < 0


def test_no_lpips_without_package_or_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lpips("cpu") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert lpips("cpu") is None


def test_lpips_gets_pictures_as_it_wants_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """[1, 3, H, W] in 0..1, which ``normalize`` brings to its own range."""
    weights = tmp_path / fidelity._ALEXNET
    weights.parent.mkdir()
    weights.touch()

    class Network(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, got: Tensor, want: Tensor, normalize: bool) -> Tensor:
            assert got.shape == want.shape == (1, 3, 4, 5) and normalize
            return (got - want).mean()

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    distance = lpips("cpu")
    assert distance is not None
    assert distance(torch.full((4, 5, 3), 0.75), torch.full((4, 5, 3), 0.5)) == pytest.approx(0.25)
