"""Which kernels are chosen, what is said where it is not Triton's, and that it is said once."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import pytest
import torch

from lens_core.encoder.moe import DenseExperts
from lens_core.kernels import Bank, DenseMatrices, backend, choose, registry
from lens_core.kernels.registry import EAGER, random_bank, why_not_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def bank(experts: int = 4, hidden: int = 64, inner: int = 32, form: str = "mxfp4") -> Bank:
    return random_bank(experts, hidden, inner, form, torch.Generator().manual_seed(0), "cpu")


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch):
    """A GPU that meets every limit; choices of earlier tests are forgotten, and this one's after it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(registry, "difference", lambda *_: 0.0)

    def forget() -> None:
        for cached in (registry._self_test, registry._say_once):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
def test_triton_where_every_limit_is_met(dtype: torch.dtype, form: str):
    assert why_not_triton(CUDA, dtype, bank(form=form), largest_scale=128) is None
    assert choose(CUDA, dtype, bank(form=form), largest_scale=128).name == "triton"


@pytest.mark.parametrize(
    ("experts", "dtype", "scale", "reason"),
    [
        (4, torch.float32, 0, "the encoder computes in float32, and they take 16-bit floats"),
        (6, torch.bfloat16, 0, "6 experts are not a power of two"),
        (4, torch.bfloat16, 129, "a scale byte is 129, and they take 128 at most"),
    ],
)
def test_limits_of_dtype_experts_and_scales(experts: int, dtype: torch.dtype, scale: int, reason: str):
    assert why_not_triton(CUDA, dtype, bank(experts), scale) == reason


@pytest.mark.parametrize(("hidden", "inner"), [(80, 32), (64, 24)])
def test_limits_of_sizes(hidden: int, inner: int):
    """No packed bank has such columns, but a dense one may."""
    gate_up = DenseMatrices(torch.zeros(4, 2 * inner, hidden), torch.zeros(4, 2 * inner))
    down = DenseMatrices(torch.zeros(4, hidden, inner), torch.zeros(4, hidden))
    reason = f"sizes {hidden} and {inner} are not multiples of 32"
    assert why_not_triton(CUDA, torch.bfloat16, Bank(gate_up, down, 1.702, 7.0)) == reason


def test_without_triton(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    reason = why_not_triton(CUDA, torch.bfloat16, bank())
    assert reason is not None
    assert reason.startswith("Triton is not installed") and "pip install triton-windows" in reason


def test_an_older_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    reason = "this GPU has compute capability 7.5, and they need 8.0"
    assert why_not_triton(CUDA, torch.float16, bank()) == reason


def test_amds_capability_is_not_nvidias(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (0, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert why_not_triton(CUDA, torch.float16, bank()) is None


def test_a_cpu_is_no_reason_to_say_anything(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        assert choose(CPU, torch.bfloat16, bank()) is EAGER
    assert caplog.messages == []


def test_a_refusal_is_said_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choose(CUDA, torch.float32, bank()) is EAGER
        assert len(caplog.messages) == 1
        assert choose(CUDA, torch.bfloat16, bank(), largest_scale=200) is EAGER
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        "the encoder computes in float32, and they take 16-bit floats.",
        "a scale byte is 200, and they take 128 at most.",
    ]


@pytest.mark.parametrize("error", [0.05, float("inf")])
def test_a_self_test_that_differs(
    error: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(registry, "difference", lambda *_: error)
    for _ in range(2):
        assert choose(CUDA, torch.bfloat16, bank()) is EAGER
    (line,) = caplog.messages
    assert f"the self-test differs from PyTorch by {error:.1e}" in line


def test_a_self_test_that_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def fail(*_: Any) -> float:
        raise OSError("  gcc: not found\n" + "x" * 999)

    monkeypatch.setattr(registry, "difference", fail)
    for _ in range(2):
        assert choose(CUDA, torch.bfloat16, bank()) is EAGER
    (line,) = caplog.messages
    assert "the self-test failed (OSError: gcc: not found" in line and len(line) < 400


def test_the_self_test_runs_once_for_each_kind_of_bank(monkeypatch: pytest.MonkeyPatch):
    ran = []
    monkeypatch.setattr(registry, "difference", lambda *call: ran.append(call) or 0.0)
    for form, experts in (("mxfp4", 4), ("mxfp4", 4), ("nvfp4", 4), ("mxfp4", 8)):
        choose(CUDA, torch.bfloat16, bank(experts, form=form))
    choose(CUDA, torch.float16, bank())
    assert [(str(dtype), form, experts) for _, dtype, form, experts in ran] == [
        ("torch.bfloat16", "mxfp4", 4),
        ("torch.bfloat16", "nvfp4", 4),
        ("torch.bfloat16", "mxfp4", 8),
        ("torch.float16", "mxfp4", 4),
    ]


def test_a_dense_bank_is_judged_like_any_other():
    dense = DenseExperts(bank(), torch.bfloat16).bank()
    assert choose(CUDA, torch.bfloat16, dense).name == "triton"


def test_a_difference_is_seen_wherever_it_is():
    ones, nothing = torch.ones(4), torch.full((4,), float("nan"))
    assert backend.apart(ones, ones) == 0
    assert backend.apart(nothing, ones) == backend.apart((ones, nothing), (ones, ones)) == float("inf")
    assert backend.apart((ones, None), (ones, None)) == 0
    assert backend.apart((ones * 1.1, ones), (ones, ones)) == pytest.approx(0.1, rel=1e-5)
