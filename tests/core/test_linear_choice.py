"""Which kernels quantised linears run on, what is said where a layer stays weight-only, and that it is said
once."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core.kernels import EAGER_LINEAR, LinearKernels, backend, choose_linear, linear_registry
from lens_core.kernels.linear import linear, multiply
from lens_core.kernels.scaled_mm import multiply_float8, why_not_multiply_float8
from lens_core.kernels.triton.linear_launch import Tile, choose_tile, why_not_multiply
from lens_core.quant import linear as quant
from lens_core.quant.layer_format import LayerFormat, affine4, float8, int8
from lens_core.quant.linear import Packed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CACHED = (
    choose_linear,
    linear_registry.why_not_triton_linear,
    linear_registry.why_not,
    linear_registry._say_once,
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which GPU there is; choices of earlier tests are forgotten, and this one's after it."""

    def describe(*capability: int, hip: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    def forget() -> None:
        for cached in CACHED:
            cached.cache_clear()

    monkeypatch.setattr(linear_registry, "difference", lambda *_: 0.0)
    monkeypatch.setattr(linear_registry, "product_difference", lambda *_: 0.0)
    describe(9, 0)
    forget()
    yield describe
    forget()


def weight(form: LayerFormat, rows: int = 32, columns: int = 64) -> Packed:
    return quant.quantize(torch.ones(rows, columns), form.dynamic(True))


def kinds_of(kernels: LinearKernels) -> dict[str, str | None]:
    """What inputs of layers with all limits met are quantised to."""
    return {form.name: kernels.inputs_of(weight(form)) for form in (float8, int8, affine4)}


NOTHING = {"float8_e4m3fn": None, "int8_tensorwise": None, "lens_affine": None}
BOTH = NOTHING | {"float8_e4m3fn": "float8", "int8_tensorwise": "int8"}


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_both_kinds_where_every_limit_is_met(gpu, capability, caplog: pytest.LogCaptureFixture):
    gpu(*capability)
    with caplog.at_level(logging.DEBUG):
        kernels = choose_linear(CUDA, torch.bfloat16)
        assert kinds_of(kernels) == BOTH
    assert caplog.messages == []
    assert kernels.name == "triton" and list(kernels.multiply) == ["float8", "int8"]
    assert kernels.multiply["float8"] is multiply_float8
    for operation in (kernels.quantize_rows, kernels.unpack, kernels.multiply["int8"]):
        assert operation.__module__ == "lens_core.kernels.triton.linear_launch"


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "reason"),
    [
        ((8, 0), None, torch.bfloat16, "this GPU has compute capability 8.0, and 8-bit floats need 8.9"),
        ((8, 6), None, torch.bfloat16, "this GPU has compute capability 8.6, and 8-bit floats need 8.9"),
        ((9, 4), "7.0", torch.bfloat16, "8-bit floats are multiplied on NVIDIA's GPUs alone"),
        (
            (9, 0),
            None,
            torch.float16,
            "the denoiser computes in float16, and products of 8-bit floats come in bfloat16",
        ),
    ],
)
def test_float8_is_weight_only(gpu, capability, hip, dtype, reason, caplog: pytest.LogCaptureFixture):
    gpu(*capability, hip=hip)
    kernels = choose_linear(CUDA, dtype)
    assert kernels.name == "triton" and list(kernels.multiply) == ["int8"]
    assert caplog.messages == [], "nothing is said to models without such layers"
    for _ in range(3):
        assert kinds_of(kernels) == NOTHING | {"int8_tensorwise": "int8"}
    name = str(dtype).removeprefix("torch.")
    assert caplog.messages == [f"float8: the weights stay 8-bit and are multiplied in {name}: {reason}."]
    assert linear_registry.why_not("float8", CUDA, dtype) == reason


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), torch.float16, "this GPU has compute capability 7.5, and they need 8.0"),
        ((9, 0), torch.float32, "the denoiser computes in float32, and they take 16-bit floats"),
    ],
)
def test_the_definitions_where_triton_cannot(
    gpu, capability, dtype, reason, caplog: pytest.LogCaptureFixture
):
    gpu(*capability)
    for _ in range(3):
        kernels = choose_linear(CUDA, dtype)
    assert (kernels.quantize_rows, kernels.unpack) == (quant.quantize_rows, quant.unpack)
    assert kernels.name == "torch" and kernels.multiply == {}
    start = "Quantised weights are unpacked in plain PyTorch, slower than with Triton: "
    assert caplog.messages == [f"{start}{reason}."]
    assert kinds_of(kernels) == kinds_of(kernels) == NOTHING
    assert [message.split(":")[0] for message in caplog.messages[1:]] == ["float8", "int8"]
    assert linear_registry.why_not("int8", CUDA, dtype) == reason


def test_without_triton_float8_remains(gpu, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    kernels = choose_linear(CUDA, torch.bfloat16)
    assert kernels.name == "torch" and kernels.multiply == {"float8": multiply_float8}
    assert kinds_of(kernels) == NOTHING | {"float8_e4m3fn": "float8"}
    reason = linear_registry.why_not("int8", CUDA, torch.bfloat16)
    assert reason is not None and reason.startswith("Triton is not installed")


def test_a_cpu_has_the_definitions(gpu, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        assert choose_linear(CPU, torch.bfloat16) is EAGER_LINEAR
        assert kinds_of(EAGER_LINEAR) == BOTH
    assert caplog.messages == []


@pytest.mark.parametrize("error", [0.05, backend.SELF_TEST_LIMIT, float("nan")])
def test_a_self_test_that_differs(gpu, error: float, monkeypatch, caplog: pytest.LogCaptureFixture):
    ran: list[Any] = []
    monkeypatch.setattr(linear_registry, "difference", lambda *call: ran.append(call) or error)
    for _ in range(2):
        assert choose_linear(CUDA, torch.bfloat16).name == "torch"
    (line,) = caplog.messages
    assert f"the self-test differs from PyTorch by {error:.1e}" in line
    assert ran == [(CUDA, torch.bfloat16)]


def test_a_kind_is_tested_when_a_layer_asks_for_it(gpu, monkeypatch, caplog: pytest.LogCaptureFixture):
    ran: list[Any] = []

    def fail(*call: Any) -> float:
        ran.append(call)
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(linear_registry, "product_difference", fail)
    kernels = choose_linear(CUDA, torch.bfloat16)
    assert kernels.inputs_of(weight(affine4)) is None and ran == []
    for _ in range(2):
        assert kernels.inputs_of(weight(float8)) is None
    assert ran == [("float8", CUDA, torch.bfloat16)]
    assert caplog.messages == [
        "float8: the weights stay 8-bit and are multiplied in bfloat16: the self-test failed (RuntimeError: "
        "no kernel image is available)."
    ]


@pytest.mark.parametrize(
    ("form", "rows", "columns", "reason"),
    [
        (float8, 24, 64, "a layer has 64 inputs and 24 outputs, no multiples of 16"),
        (float8, 32, 341, "a layer has 341 inputs and 32 outputs, no multiples of 16"),
        (int8, 32, 341, "a layer has 341 inputs and 32 outputs, no multiples of 16 and 8"),
        (int8, 20, 64, "a layer has 64 inputs and 20 outputs, no multiples of 16 and 8"),
        (int8, 24, 64, None),
    ],
)
def test_limits_of_sizes(gpu, form, rows, columns, reason, caplog: pytest.LogCaptureFixture):
    kernels, packed = choose_linear(CUDA, torch.bfloat16), weight(form, rows, columns)
    for _ in range(2):
        assert kernels.inputs_of(packed) == (None if reason else form.kind)
    limit = why_not_multiply if form is int8 else why_not_multiply_float8
    assert limit(packed) == reason and len(caplog.messages) == bool(reason)


def test_float8_of_the_other_kind():
    packed = weight(float8)._replace(values=torch.zeros(32, 64).to(torch.float8_e5m2))
    assert why_not_multiply_float8(packed) == "a weight is float8_e5m2, not float8_e4m3fn"


def test_a_linear_that_may_not_multiply_8_bit_numbers_unpacks(gpu):
    """The format asks for quantised inputs, these kernels do not."""
    packed, x = weight(int8), torch.randn(1, 3, 64)
    kernels = replace(EAGER_LINEAR, multiply={}, why_not=lambda _: "no reason")
    assert torch.equal(linear(x, packed, None, kernels), x @ quant.unpack(packed, torch.float32).T)


@pytest.mark.parametrize(("kind", "form"), [("int8", int8), ("float8", float8)])
def test_the_self_tests_notice_wrong_results(kind: str, form: LayerFormat, monkeypatch):
    """The definitions themselves, one of them 2 % wrong."""
    right = replace(EAGER_LINEAR, multiply={"int8": multiply})
    spoilt = {
        "unpack": replace(right, unpack=lambda *call: quant.unpack(*call) * 1.02),
        "rows": replace(right, quantize_rows=lambda x, kind: quant.quantize_rows(x * 1.02, kind)),
    }
    monkeypatch.setattr(linear_registry, "triton_linear_kernels", lambda: right)
    monkeypatch.setattr(linear_registry, "multiply_float8", multiply)
    monkeypatch.setattr(linear_registry, "_REPEATS", (1,))
    assert linear_registry.difference(CPU, torch.bfloat16) == 0
    assert linear_registry.product_difference(kind, CPU, torch.bfloat16) == 0
    for kernels in spoilt.values():
        monkeypatch.setattr(linear_registry, "triton_linear_kernels", lambda kernels=kernels: kernels)
        assert linear_registry.difference(CPU, torch.bfloat16) >= backend.SELF_TEST_LIMIT

    def wrong(x: quant.QuantizedRows, packed: Packed, bias: Tensor | None) -> Tensor:
        """A column takes its neighbour's scale, or without a bias its weight's neighbour."""
        return multiply(x, packed._replace(values=packed.values.roll(1, 0)) if bias is None else packed, bias)

    broken = replace(right, multiply={"int8": wrong})
    monkeypatch.setattr(linear_registry, "triton_linear_kernels", lambda: broken)
    monkeypatch.setattr(linear_registry, "multiply_float8", wrong)
    assert linear_registry.product_difference(kind, CPU, torch.bfloat16) >= backend.SELF_TEST_LIMIT


@pytest.mark.parametrize(
    ("tokens", "outputs", "tile"),
    [
        (4096, 4608, (128, 256)),
        (4096, 4096, (128, 256)),
        (4096, 1536, (128, 128)),
        (8100, 4608, (128, 256)),
        (8100, 1536, (128, 256)),
        (200, 4608, (64, 128)),
        (200, 1536, (64, 128)),
        (1, 1536, (64, 128)),
    ],
)
def test_the_tiles_that_were_measured(tokens: int, outputs: int, tile: tuple[int, int]):
    """Of an H200 with 132 multiprocessors; GPUs without descriptors have the smaller two."""
    chosen = choose_tile(tokens, outputs, 132, hopper=True)
    assert chosen == Tile(*tile, 128, *((8, 3) if tile[1] == 256 else (4, 4)))
    other = choose_tile(tokens, outputs, 108, hopper=False)
    assert other == Tile(tile[0], 128, 64, 4, 4)
    for each, kilobytes in ((chosen, 227), (other, 64)):  # of shared memory
        assert (each.rows + each.columns) * each.inner * each.stages <= kilobytes * 1024
