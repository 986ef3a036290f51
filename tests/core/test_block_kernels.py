"""A block's operations between its matrix products: the definitions against fp64, and which kernels run."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from lens_core import ops
from lens_core.kernels import EAGER_BLOCK, BlockKernels, backend, block, block_registry, choose_block
from lens_core.kernels.block import HeadNorms, Inputs, Rows, score_bound
from lens_core.ops import cudnn_sdpa, fastest_attention, padding_mask, sdpa
from lens_core.quant.linear import QuantizedRows
from tests.compare import relative_l2
from tests.core import block_cases as cases
from tests.core import block_formulas as formulas

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# fp32 rounds by up to 6e-8 at each of some five places, bf16 by up to 2^-9 = 2e-3. Measured: 2e-7, 4.8e-3.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
TOKENS = [(5,), (3, 4), (2, 7)]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("gate", "shift"), [(5, 0), (2, 3)])
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_rows(tokens: tuple[int, ...], gate: int, shift: int, dtype: torch.dtype):
    rows = cases.rows(tokens, 2, 96, dtype)
    totals, normed = block.add_modulate(rows, gate, shift)
    assert len(totals) == len(normed) == len(tokens)
    for row, total, norm in zip(rows, totals, normed, strict=True):
        assert total.dtype == norm.dtype == dtype
        assert relative_l2(total, formulas.total(row, gate)) < ROUNDING[dtype]
        assert relative_l2(norm, formulas.normed(total, row, shift)) < ROUNDING[dtype]


def test_rows_without_updates_or_norms():
    rows = cases.rows((3, 4), 2, 96, torch.float32)
    totals, normed = block.add_modulate([row._replace(update=None) for row in rows], 5, 0)
    for row, total, norm in zip(rows, totals, normed, strict=True):
        assert torch.equal(total, row.x)
        assert relative_l2(norm, formulas.normed(row.x, row, 0)) < ROUNDING[torch.float32]
    totals, normed = block.add_modulate([Rows(*row[:3]) for row in rows], 5, 0)
    assert normed == []
    for row, total in zip(rows, totals, strict=True):
        assert relative_l2(total, formulas.total(row, 5)) < ROUNDING[torch.float32]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_heads(tokens: tuple[int, ...], dtype: torch.dtype):
    streams, norms = cases.projections(tokens, 2, 3, dtype), cases.head_norms(len(tokens), dtype)
    angle, rotary = cases.angles(tokens)
    got = block.joint_heads(streams, norms, rotary)
    for name, x, want in zip("qkv", got, formulas.heads(streams, norms, angle), strict=True):
        assert x.shape == (2, sum(tokens), 3, 64) and x.dtype == dtype, name
        assert relative_l2(x, want) < ROUNDING[dtype], name


@pytest.mark.parametrize("image_only", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_attention(tokens: tuple[int, ...], dtype: torch.dtype, image_only: bool):
    streams, norms = cases.projections(tokens, 2, 3, dtype), cases.head_norms(len(tokens), dtype)
    angle, rotary = cases.angles(tokens)
    got = block.attend(streams, norms, rotary, image_only)
    want = formulas.attended(*formulas.heads(streams, norms, angle)).split(list(tokens), dim=1)
    assert len(got) == (1 if image_only else len(tokens))
    for x, y in zip(got, want, strict=False):
        assert x.shape == y.shape and x.dtype == dtype
        assert relative_l2(x, y) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_gates(dtype: torch.dtype):
    gates, ups = ([torch.randn(2, tokens, 50).to(dtype) for tokens in (3, 4)] for _ in range(2))
    for x, gate, up in zip(block.swiglu(gates, ups), gates, ups, strict=True):
        assert x.dtype == dtype and relative_l2(x, formulas.gated(gate, up)) < ROUNDING[dtype]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (64,), weight, 1e-6)


@pytest.mark.parametrize("kind", ["random", "one channel", "two channels", "weights"])
def test_no_score_exceeds_the_bound(kind: str):
    """Of random vectors, and of such as push the score up: all in the channels of the largest weights."""
    weights = torch.randn(2, 64, dtype=torch.float64)
    weights[:, 10:12] = torch.tensor([[-3.0, -3.0], [4.0, 4.0]])
    if kind == "random":
        x = 10 * torch.randn(2, 500, 64, dtype=torch.float64)
    else:
        x = torch.zeros(2, 1, 64, dtype=torch.float64)
        x[..., 10] = 100
        x[..., 11] = {"one channel": 0, "two channels": 100, "weights": 0}[kind]
        x = weights[:, None] if kind == "weights" else x
    q, k = norm(x[0], weights[0]), norm(x[1], weights[1])
    bound = score_bound(3.0, 4.0, 64)
    assert bound >= ((q @ k.T).abs() / 8).max()
    # A rotation neither helps nor hurts: both are turned to where they meet.
    for angle in torch.linspace(0, 2 * math.pi, 17):
        rotary = torch.stack([angle.cos(), angle.sin()])[:, None, None].expand(2, len(k), 32)
        turned = block.rotate_pairs(k[None, :, None], rotary)[0, :, 0]
        # The rotation is in fp32.
        assert bound * (1 + 1e-6) >= ((q @ turned.T).abs() / 8).max()
    if kind in ("one channel", "two channels"):
        assert ((q @ k.T).abs() / 8).max() > bound * (1 - 1e-6), "the bound is reached"


def test_rounding_adds_less_to_a_keys_length_than_the_kernel_allows():
    """1 %: in bf16 weighted channels are rounded once by the norm and once by the rotation."""
    weight = (3 + torch.rand(64) / 100).bfloat16()
    keys = norm(torch.randn(2000, 64).bfloat16(), weight)
    keys = block.rotate_pairs(keys[None, :, None], cases.angles((2000,))[1])[0, :, 0]
    longest = keys.double().norm(dim=-1).max() / (8 * weight.max().double())
    assert 0.99 < longest < 1.01


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which GPU there is; choices of earlier tests are forgotten, and this one's after it."""

    def describe(*capability: int, hip: str | None = None, cudnn: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: cudnn)

    def forget() -> None:
        choose_block.cache_clear()
        fastest_attention.cache_clear()

    monkeypatch.setattr(block_registry, "difference", lambda *_: 0.0)
    describe(9, 0)
    forget()
    yield describe
    forget()


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why it is not Triton, as it was said."""
    start = "The denoiser runs in plain PyTorch between its matrix products, slower than with Triton: "
    assert all(message.startswith(start) and message.endswith(".") for message in caplog.messages)
    return [message.removeprefix(start).removesuffix(".") for message in caplog.messages]


@pytest.mark.parametrize(
    ("capability", "dtype", "attends"),
    [
        ((8, 0), torch.bfloat16, False),
        ((8, 9), torch.bfloat16, False),
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, False),
        ((10, 0), torch.bfloat16, False),
        ((12, 0), torch.bfloat16, False),
        ((12, 0), torch.float16, False),
    ],
)
def test_triton_where_every_limit_is_met(gpu, capability, dtype, attends, caplog: pytest.LogCaptureFixture):
    gpu(*capability)
    with caplog.at_level(logging.DEBUG):
        kernels = choose_block(CUDA, dtype, 64)
    assert kernels.name == "triton" and caplog.messages == []
    for name in ("add_modulate", "joint_heads", "swiglu"):
        assert getattr(kernels, name).__module__ == "lens_core.kernels.triton.block_launch"
    assert (kernels.attend is not None) is attends


def test_amds_capability_is_not_nvidias(gpu):
    """An MI300 says 9.4: it has no such attention, and its own compiler refuses the launch."""
    gpu(9, 4, hip="7.0")
    kernels = choose_block(CUDA, torch.bfloat16, 64)
    assert kernels.name == "triton" and kernels.attend is None
    assert fastest_attention(CUDA) is sdpa


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        ((7, 5), torch.float16, 64, "this GPU has compute capability 7.5, and they need 8.0"),
        ((9, 0), torch.float32, 64, "the denoiser computes in float32, and they take 16-bit floats"),
        ((9, 0), torch.bfloat16, 96, "a head has 96 channels, and they take powers of two"),
        ((9, 0), torch.bfloat16, 2, "a head has 2 channels, and they take powers of two"),
    ],
)
def test_limits(gpu, capability, dtype, head_dim, reason, caplog: pytest.LogCaptureFixture):
    gpu(*capability)
    for _ in range(3):
        assert choose_block(CUDA, dtype, head_dim) is EAGER_BLOCK
    assert reasons(caplog) == [reason]


def test_without_triton(gpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert choose_block(CUDA, torch.bfloat16, 64) is EAGER_BLOCK
    (reason,) = reasons(caplog)
    assert reason.startswith("Triton is not installed")


def test_a_cpu_is_no_reason_to_say_anything(gpu, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        assert choose_block(CPU, torch.bfloat16, 64) is EAGER_BLOCK
    assert caplog.messages == [] and EAGER_BLOCK.attend is None


@pytest.mark.parametrize("error", [0.05, backend.SELF_TEST_LIMIT, float("inf"), float("nan")])
def test_a_self_test_that_differs(gpu, error: float, monkeypatch, caplog: pytest.LogCaptureFixture):
    ran: list[Any] = []
    monkeypatch.setattr(block_registry, "difference", lambda *call: ran.append(call) or error)
    for _ in range(2):
        assert choose_block(CUDA, torch.bfloat16, 64) is EAGER_BLOCK
    assert reasons(caplog) == [f"the self-test differs from PyTorch by {error:.1e}"]
    assert ran == [(CUDA, torch.bfloat16, 64)]


def test_a_self_test_that_raises(gpu, monkeypatch, caplog: pytest.LogCaptureFixture):
    def fail(*_: Any) -> float:
        raise OSError("  gcc: not found\n" + "x" * 999)

    monkeypatch.setattr(block_registry, "difference", fail)
    for _ in range(2):
        assert choose_block(CUDA, torch.bfloat16, 64) is EAGER_BLOCK
    (reason,) = reasons(caplog)
    assert reason.startswith("the self-test failed (OSError: gcc: not found") and len(reason) < 300


def larger(x: Inputs) -> Inputs:
    """Too large by 2 %."""
    return x._replace(scale=x.scale * 1.02) if isinstance(x, QuantizedRows) else x * 1.02


ONES: BlockKernels = replace(EAGER_BLOCK, name="ours", attend=block.attend)
# Each result of each operation, by the path to it.
RESULTS = [
    ("add_modulate", (0, 0)),
    ("add_modulate", (0, 1)),
    ("add_modulate", (1, 0)),
    ("add_modulate", (1, 1)),
    ("joint_heads", (0,)),
    ("joint_heads", (1,)),
    ("joint_heads", (2,)),
    ("swiglu", (0,)),
    ("swiglu", (1,)),
    ("attend", (0,)),
    ("attend", (1,)),
]


def spoilt(operation: Callable[..., Any], path: tuple[int, ...], *kinds: str) -> Callable[..., Any]:
    """The operation with one of its results, where there is such a one, 2 % too large; with ``kinds``, only
    where it is to be quantised."""

    def run(*args: Any) -> Any:
        results = operation(*args)
        if kinds and args[-1:] != kinds:
            return results
        parent = results
        for index in path[:-1]:
            parent = parent[index]
        if path[-1] < len(parent):
            values = list(parent)
            values[path[-1]] = larger(values[path[-1]])
            results = [values if parent is x else x for x in results] if len(path) > 1 else values
        return results

    return run


@pytest.mark.parametrize(("operation", "path"), RESULTS)
def test_the_self_test_notices_every_wrong_result(operation: str, path: tuple[int, ...], monkeypatch):
    """The definitions themselves, one of them a little wrong."""
    broken = replace(ONES, **{operation: spoilt(getattr(ONES, operation), path)})
    for kernels, right in ((ONES, True), (broken, False)):
        monkeypatch.setattr(block_registry, "triton_block_kernels", lambda kernels=kernels: kernels)
        error = block_registry.difference(CPU, torch.bfloat16, 8)
        # Its verdict: the definitions do not differ from themselves.
        assert error == 0 if right else error >= backend.SELF_TEST_LIMIT


@pytest.mark.parametrize(
    ("operation", "path"),
    [("add_modulate", (1, 0)), ("add_modulate", (1, 1)), ("swiglu", (0,)), ("swiglu", (1,))],
)
def test_the_self_test_notices_wrong_8_bit_numbers(operation: str, path: tuple[int, ...], monkeypatch):
    broken = replace(ONES, **{operation: spoilt(getattr(ONES, operation), path, "int8")})
    monkeypatch.setattr(block_registry, "triton_block_kernels", lambda: broken)
    assert block_registry.difference(CPU, torch.bfloat16, 8) >= backend.SELF_TEST_LIMIT


def confused(name: str) -> Callable[..., Any]:
    """``add_modulate`` or ``joint_heads`` with one input taken for another."""

    def rows(streams: list[Rows], gate: int, shift: int, *kinds: str) -> Any:
        if name == "gate":
            gate = (gate + 1) % 6
        if name == "tables":
            streams = [row._replace(after=row.before) for row in streams]
        if name == "epsilon":
            streams = [row._replace(eps=0.1) for row in streams]
        return block.add_modulate(streams, gate, shift + 1 if name == "shift" else shift, *kinds)

    def heads(streams: list[Tensor], norms: list[HeadNorms], rotary: Tensor) -> Any:
        return block.joint_heads(streams, norms[:1] * len(streams), rotary)

    return heads if name == "norms" else rows


@pytest.mark.parametrize("name", ["gate", "shift", "tables", "epsilon", "norms"])
def test_the_self_test_notices_confused_inputs(name: str, monkeypatch):
    operation = "joint_heads" if name == "norms" else "add_modulate"
    broken = replace(ONES, **{operation: confused(name)})
    monkeypatch.setattr(block_registry, "triton_block_kernels", lambda: broken)
    assert block_registry.difference(CPU, torch.bfloat16, 8) >= backend.SELF_TEST_LIMIT


def test_the_self_test_leaves_out_attention_that_is_not_chosen(monkeypatch):
    """It may not even compile there."""
    broken = replace(ONES, attend=None)
    monkeypatch.setattr(block_registry, "triton_block_kernels", lambda: broken)
    monkeypatch.setattr(block, "attend", None)
    assert block_registry.difference(CPU, torch.float16, 8) == 0


@pytest.mark.parametrize(
    ("capability", "cudnn", "fastest"),
    [
        ((9, 0), True, cudnn_sdpa),
        ((10, 0), True, cudnn_sdpa),
        ((10, 3), True, cudnn_sdpa),
        ((9, 0), False, sdpa),
        ((7, 5), True, sdpa),
        ((8, 0), True, sdpa),
        ((8, 9), True, sdpa),
        ((12, 0), True, sdpa),
    ],
)
def test_pytorchs_fastest_attention(gpu, capability: tuple[int, int], cudnn: bool, fastest):
    gpu(*capability, cudnn=cudnn)
    assert fastest_attention(CUDA) is fastest
    assert fastest_attention(CPU) is sdpa


def test_cudnn_comes_first_and_only_there(monkeypatch: pytest.MonkeyPatch):
    orders = []

    def plain(*args: Any) -> Tensor:
        orders.append(_cur_sdpa_kernel_backends(with_priority=True))
        return sdpa(*args)

    monkeypatch.setattr(ops, "sdpa", plain)
    before = _cur_sdpa_kernel_backends(with_priority=True)
    q, k, v = torch.randn(3, 2, 3, 7, 64)
    mask = padding_mask(torch.tensor([[True, False], [True, True]]), 5, torch.float32)
    assert torch.equal(cudnn_sdpa(q, k, v), sdpa(q, k, v))
    assert torch.equal(cudnn_sdpa(q, k, v, mask), sdpa(q, k, v, mask))
    assert not torch.equal(cudnn_sdpa(q, k, v, mask), sdpa(q, k, v))
    assert [order[0] for order in orders] == [SDPBackend.CUDNN_ATTENTION] * 3
    assert all(SDPBackend.MATH in order for order in orders), "there is always one that can"
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
