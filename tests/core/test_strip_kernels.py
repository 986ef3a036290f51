"""Operations on the VAE's strips: the definitions against fp64, and which kernels run."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lens_core.kernels import EAGER_STRIPS, StripKernels, backend, choose_strips, strip_registry, strips
from lens_core.kernels.triton import strip_launch
from tests.compare import relative_l2
from tests.core import strip_cases as cases

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# fp32 sums of some thousand numbers.
EXACT = 1e-6


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_moments(mean: float):
    x = cases.strip(6, 9, 31, torch.float32, mean)
    want = x.double().transpose(0, 1).flatten(1)
    count, got, variance = cases.combined(strips.add_moments(x))
    assert torch.equal(count, torch.full_like(count, 9 * 31))
    assert relative_l2(got, want.mean(1)) < EXACT
    # Of deviations beside a mean 1e4 times as large the rounding is that much larger.
    assert relative_l2(variance, want.var(1, correction=0)) < (1e-4 if mean else EXACT)


def test_what_is_added_counts():
    x, residual, bias = *(cases.strip(6, 4, 5, torch.bfloat16) for _ in range(2)), torch.randn(6).bfloat16()
    want = (x + bias.view(1, -1, 1, 1)) + residual
    moments = strips.add_moments(x, bias, residual)
    assert torch.equal(x, want) and moments.dtype == torch.float32
    assert torch.equal(moments, strips.add_moments(want))


@pytest.mark.parametrize("heights", [(7,), (4, 4, 1)], ids=str)
@pytest.mark.parametrize(("channels", "groups"), [(8, 4), (6, 1), (12, 3)])
def test_a_norm_of_parts_is_the_whole_ones(channels: int, groups: int, heights: tuple[int, ...]):
    parts = [cases.strip(channels, rows, 5, torch.float64, mean=index) for index, rows in enumerate(heights)]
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    moments = torch.cat([strips.add_moments(part) for part in parts])
    scale, shift = strips.affine(moments, weight, bias, groups, 1e-6)
    assert scale.shape == shift.shape == (1, channels, 1, 1)
    picture = torch.cat(parts, 2)
    want = F.group_norm(picture, groups, weight, bias, 1e-6)
    assert relative_l2(picture * scale + shift, want) < 1e-14
    assert (
        relative_l2(
            torch.stack([scale.flatten(), shift.flatten()]),
            cases.group_norm(parts, weight, bias, groups, 1e-6),
        )
        < 1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm_and_silu_round_once_each(dtype: torch.dtype):
    piece, (scale, shift) = cases.strip(6, 3, 5, dtype), torch.randn(2, 1, 6, 1, 1)
    window = torch.empty_like(piece)
    strips.normalise_silu(window, piece, scale, shift)
    norm = (piece.float() * scale + shift).to(dtype)
    assert relative_l2(window, F.silu(norm.double())) < max(1e-7, torch.finfo(dtype).eps)
    assert relative_l2(window, F.silu(norm)) < 1e-7


def test_pixels_are_doubled_both_ways_or_in_their_row():
    piece = cases.strip(3, 4, 5, torch.float32)
    want = F.interpolate(piece, scale_factor=2, mode="nearest")
    tall, flat = torch.empty_like(want), torch.empty(1, 3, 4, 10)
    strips.double(tall, piece)
    strips.double(flat, piece)
    assert torch.equal(tall, want) and torch.equal(flat, want[:, :, ::2])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which GPU there is; choices of earlier tests are forgotten, and this one's after it."""

    def describe(*capability: int, hip: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    monkeypatch.setattr(strip_registry, "difference", lambda *_: 0.0)
    describe(9, 0)
    choose_strips.cache_clear()
    yield describe
    choose_strips.cache_clear()


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why it is not Triton, as it was said."""
    start = "The VAE decodes in plain PyTorch between its convolutions, slower than with Triton: "
    assert all(message.startswith(start) and message.endswith(".") for message in caplog.messages)
    return [message.removeprefix(start).removesuffix(".") for message in caplog.messages]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triton_where_every_limit_is_met(gpu, capability, dtype, caplog: pytest.LogCaptureFixture):
    gpu(*capability)
    with caplog.at_level(logging.DEBUG):
        kernels = choose_strips(CUDA, dtype)
    assert kernels.name == "triton" and kernels.adds_bias and caplog.messages == []
    for name in ("add_moments", "affine", "normalise_silu", "double"):
        assert getattr(kernels, name) is getattr(strip_launch, name)


def test_triton_on_amds(gpu):
    gpu(9, 4, hip="7.0")
    assert choose_strips(CUDA, torch.bfloat16).name == "triton"


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), torch.float16, "this GPU has compute capability 7.5, and they need 8.0"),
        ((9, 0), torch.float32, "the VAE computes in float32, and they take 16-bit floats"),
    ],
)
def test_limits(gpu, capability, dtype, reason, caplog: pytest.LogCaptureFixture):
    gpu(*capability)
    for _ in range(3):
        assert choose_strips(CUDA, dtype) is EAGER_STRIPS
    assert reasons(caplog) == [reason]


def test_without_triton(gpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert choose_strips(CUDA, torch.bfloat16) is EAGER_STRIPS
    (reason,) = reasons(caplog)
    assert reason.startswith("Triton is not installed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_cpu_is_no_reason_to_say_anything(gpu, dtype, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        assert choose_strips(CPU, dtype) is EAGER_STRIPS
    assert caplog.messages == [] and not EAGER_STRIPS.adds_bias


@pytest.mark.parametrize("error", [0.05, backend.SELF_TEST_LIMIT, float("inf"), float("nan")])
def test_a_self_test_that_differs(gpu, error: float, monkeypatch, caplog: pytest.LogCaptureFixture):
    ran: list[Any] = []
    monkeypatch.setattr(strip_registry, "difference", lambda *call: ran.append(call) or error)
    for _ in range(2):
        assert choose_strips(CUDA, torch.bfloat16) is EAGER_STRIPS
    assert reasons(caplog) == [f"the self-test differs from PyTorch by {error:.1e}"]
    assert ran == [(CUDA, torch.bfloat16)]


def test_a_self_test_that_raises(gpu, monkeypatch, caplog: pytest.LogCaptureFixture):
    def fail(*_: Any) -> float:
        raise OSError("gcc: not found")

    monkeypatch.setattr(strip_registry, "difference", fail)
    assert choose_strips(CUDA, torch.bfloat16) is EAGER_STRIPS
    assert reasons(caplog) == ["the self-test failed (OSError: gcc: not found)"]


def larger(*written: Tensor) -> None:
    for x in written:
        x.mul_(1.03)


def spoilt(what: str) -> StripKernels:
    """The definitions, one of them a little wrong."""

    def add_moments(x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        moments = strips.add_moments(
            x, None if what == "no bias" else bias, None if what == "no residual" else residual
        )
        if what in ("mean", "squares"):
            larger(moments[:, 1 + (what == "squares")])
        if what == "sum":
            larger(x)
        return moments

    def affine(*args: Any) -> tuple[Tensor, Tensor]:
        results = dict(zip(("scale", "shift"), strips.affine(*args), strict=True))
        larger(*(value for name, value in results.items() if name == what))
        return results["scale"], results["shift"]

    def normalise_silu(window: Tensor, piece: Tensor, scale: Tensor, shift: Tensor) -> None:
        strips.normalise_silu(window, piece, scale, shift)
        if what == "no SiLU":
            torch.addcmul(shift, piece, scale, out=window)

    def double(window: Tensor, piece: Tensor) -> None:
        strips.double(window, piece)
        if what == "flat" and window.shape[2] == piece.shape[2]:
            larger(window)
        if what == "tall" and window.shape[2] != piece.shape[2]:
            window[:, :, 1:] = window[:, :, :-1].clone()

    return replace(
        EAGER_STRIPS, add_moments=add_moments, affine=affine, normalise_silu=normalise_silu, double=double
    )


MISTAKES = ("no bias", "no residual", "mean", "squares", "sum", "scale", "shift", "no SiLU", "flat", "tall")


@pytest.mark.parametrize("what", ["nothing", *MISTAKES])
def test_the_self_test_notices_every_mistake(what: str, monkeypatch):
    monkeypatch.setattr(strip_registry, "triton_strip_kernels", lambda: spoilt(what))
    error = strip_registry.difference(CPU, torch.bfloat16)
    assert error == 0 if what == "nothing" else error >= backend.SELF_TEST_LIMIT
