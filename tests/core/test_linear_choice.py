"""Which kernels quantised linears run on, what is said where a layer stays weight-only, and that it is said
once."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core.kernels import EAGER_LINEAR, LinearKernels, backend, choose_linear, linear_registry
from lens_core.kernels.linear import linear, multiply
from lens_core.kernels.linear import quantize_rows as quant_rows
from lens_core.kernels.linear import unpack as quant_unpack
from lens_core.kernels.scaled_mm import multiply_float8, why_not_multiply_float8
from lens_core.kernels.triton.linear_launch import Tile, choose_tile, why_not_multiply
from lens_core.quant import linear as quant
from lens_core.quant.layer_format import LayerFormat, affine4, float8, int8
from tests.core import quantized_cases as cases

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


def kind_of(kernels: LinearKernels, form: LayerFormat, size: tuple[int, int] = (32, 64)) -> str | None:
    """What inputs of a layer of ``size`` (N, K) are quantised to, whose format asks for it."""
    return kernels.inputs_of(form.dynamic(True), size)


def kinds_of(kernels: LinearKernels) -> dict[str, str | None]:
    """What inputs of layers with all limits met are quantised to."""
    return {form.name: kind_of(kernels, form) for form in (float8, int8, affine4)}


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
    assert kernels.multiply["float8"] is linear_registry._float8_product
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
    assert (kernels.quantize_rows, kernels.unpack) == (EAGER_LINEAR.quantize_rows, EAGER_LINEAR.unpack)
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
    assert kind_of(kernels, affine4) is None and ran == []
    for _ in range(2):
        assert kind_of(kernels, float8) is None
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
        (float8, 32, 64, None),
        (int8, 32, 341, "a layer has 341 inputs, no multiple of 16"),
        (int8, 32, 24, "a layer has 24 inputs, no multiple of 16"),
        (int8, 7, 64, None),
    ],
)
def test_limits_of_sizes(gpu, form, rows, columns, reason, caplog: pytest.LogCaptureFixture):
    kernels = choose_linear(CUDA, torch.bfloat16)
    for _ in range(2):
        assert kind_of(kernels, form, (rows, columns)) == (None if reason else form.kind)
    limit = why_not_multiply if form is int8 else why_not_multiply_float8
    assert limit(rows, columns) == reason and len(caplog.messages) == bool(reason)


def test_float8_of_the_other_kind_is_weight_only():
    assert LayerFormat("float8_e5m2", 8).dynamic(True).inputs is None


def test_a_linear_that_may_not_multiply_8_bit_numbers_unpacks(gpu):
    """The format asks for quantised inputs, these kernels do not."""
    packed, x = quant.quantize(torch.ones(32, 64), int8.dynamic(True)), torch.randn(1, 3, 64)
    kernels = replace(EAGER_LINEAR, multiply={}, why_not=lambda *_: "no reason")
    assert torch.equal(linear(x, packed, None, kernels), x @ quant.unpack(packed, torch.float32).T)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> LinearKernels:
    """The definitions are what is tested, as if they were Triton's and PyTorch's."""
    right = replace(EAGER_LINEAR, multiply={"int8": multiply})
    monkeypatch.setattr(linear_registry, "why_not_triton_linear", lambda *_: None)
    monkeypatch.setattr(linear_registry, "triton_linear_kernels", lambda: right)
    monkeypatch.setattr(linear_registry, "multiply_float8", multiply)
    monkeypatch.setattr(linear_registry, "_REPEATS", (1,))
    return right


SPOILT = {
    "weights": {"unpack": lambda *call: [x * 1.02 for x in quant_unpack(*call)]},
    "rows": {"quantize_rows": lambda streams, kind: quant_rows([x * 1.02 for x in streams], kind)},
    "the text's weights": {"unpack": lambda weights, dtype: 2 * quant_unpack(weights, dtype)[:1]},
    "the text's rows": {"quantize_rows": lambda x, kind: quant_rows([x[0], 1.02 * x[1]], kind)},
}


@pytest.mark.parametrize("what", SPOILT)
def test_the_self_test_notices_wrong_rows_and_weights(on_cpu: LinearKernels, what: str, monkeypatch):
    """The definitions themselves, one of them 2 % wrong, or one stream's result in the other's place."""
    assert linear_registry.difference(CPU, torch.bfloat16) == 0
    spoilt = replace(on_cpu, **SPOILT[what])
    monkeypatch.setattr(linear_registry, "triton_linear_kernels", lambda: spoilt)
    assert linear_registry.difference(CPU, torch.bfloat16) >= backend.SELF_TEST_LIMIT


def neighbours(streams: Any, weights: Any, biases: Any) -> list[Tensor]:
    """A column takes its neighbour's weight where there is no bias."""
    turned = [
        packed._replace(values=packed.values.roll(1, 0)) if bias is None else packed
        for packed, bias in zip(weights, biases, strict=True)
    ]
    return multiply(streams, turned, biases)


WRONG = {
    "neighbours": neighbours,
    "one weight for both": lambda x, weights, biases: multiply(x, [weights[0]] * 2, biases),
    "one bias for both": lambda x, weights, biases: multiply(x, weights, [biases[1]] * 2),
    "rows' scales": lambda x, *rest: multiply([r._replace(scale=r.scale.roll(1, 1)) for r in x], *rest),
}


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("what", WRONG)
def test_the_self_test_notices_wrong_products(on_cpu: LinearKernels, what: str, kind: str, monkeypatch):
    """By Triton, and of floats by PyTorch too."""
    assert linear_registry.product_difference(kind, CPU, torch.bfloat16) == 0
    broken = replace(on_cpu, multiply={"int8": WRONG[what]})
    with monkeypatch.context() as patch:
        patch.setattr(linear_registry, "triton_linear_kernels", lambda: broken)
        assert linear_registry.product_difference(kind, CPU, torch.bfloat16) >= backend.SELF_TEST_LIMIT
    monkeypatch.setattr(linear_registry, "multiply_float8", WRONG[what])
    error = linear_registry.product_difference(kind, CPU, torch.bfloat16)
    assert error >= backend.SELF_TEST_LIMIT if kind == "float8" else error == 0


def test_without_triton_the_self_test_is_of_pytorch_alone(on_cpu: LinearKernels, monkeypatch):
    """Importing Triton's kernels would fail, and with it products that need them not."""
    monkeypatch.setattr(linear_registry, "why_not_triton_linear", lambda *_: "no Triton")
    monkeypatch.setattr(linear_registry, "triton_linear_kernels", None)
    assert linear_registry.product_difference("float8", CPU, torch.bfloat16) == 0
    monkeypatch.setattr(linear_registry, "multiply_float8", neighbours)
    error = linear_registry.product_difference("float8", CPU, torch.bfloat16)
    assert error >= backend.SELF_TEST_LIMIT


@pytest.mark.parametrize(
    ("batch", "tokens", "by"),
    [
        (1, (5, 3), "Triton"),
        (1, (5900, 99), "Triton"),
        (2, (2900, 99), "Triton"),
        (1, (5900, 100), "PyTorch"),
        (2, (2900, 100), "PyTorch"),
        (1, (3,), "PyTorch"),
        (1, (6000,), "PyTorch"),
    ],
)
def test_who_multiplies_8_bit_floats(
    on_cpu: LinearKernels, batch: int, tokens: tuple[int, ...], by: str, monkeypatch
):
    """Image and text by one launch where the GPU waits for launches."""
    layers = list(zip(*cases.layers("float8", tokens, 16, 16, batch), strict=True))
    calls: list[str] = []

    def noted(name: str) -> Callable[..., list[Tensor]]:
        return lambda *call: calls.append(name) or multiply(*call)

    kernels = replace(on_cpu, multiply={"int8": noted("Triton")})
    monkeypatch.setattr(linear_registry, "triton_linear_kernels", lambda: kernels)
    monkeypatch.setattr(linear_registry, "multiply_float8", noted("PyTorch"))
    found = linear_registry._float8_product(*layers)
    assert calls == [by]
    assert all(torch.equal(got, want) for got, want in zip(found, multiply(*layers), strict=True))


@pytest.mark.parametrize("multiprocessors", [132, 108, 46])
@pytest.mark.parametrize("outputs", [4608, 1536, 4096, 136])
@pytest.mark.parametrize("tokens", [8100, 4096, 1000, 200, 1])
def test_tiles(tokens: int, outputs: int, multiprocessors: int):
    """The smaller only where the larger would leave multiprocessors without work."""
    chosen = choose_tile(tokens, outputs, multiprocessors)
    busy = math.ceil(tokens / 128) * math.ceil(outputs / 128) >= multiprocessors
    assert chosen == (Tile(128, 128, 128, 8, 3) if busy else Tile(64, 128, 128, 4, 3))
    # Shared memory of compute capability 8.6 and 8.9, of which a kibibyte is the driver's.
    assert (chosen.rows + chosen.columns) * chosen.inner * chosen.stages <= 99 * 1024


def test_the_tiles_that_were_measured():
    """Of an H200."""
    sizes = [(4096, 1536), (4096, 4608), (8100, 1536), (8100, 4096), (200, 4608), (200, 1536), (1, 1536)]
    assert [choose_tile(*size, 132).rows for size in sizes] == [128] * 4 + [64] * 3


def test_as_many_tiles_as_multiprocessors_are_enough():
    assert choose_tile(11 * 128, 12 * 128, 132).rows == 128
    assert choose_tile(10 * 128, 12 * 128, 132).rows == choose_tile(11 * 128, 12 * 128, 133).rows == 64
