"""What PyTorch's products of 8-bit floats are given, and how long a weight's column scales are kept.

The product is a stand-in with PyTorch's conditions: a CPU's build need not have it.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lens_core.kernels import scaled_mm
from lens_core.kernels.scaled_mm import multiply_float8
from lens_core.quant.layer_format import float8
from lens_core.quant.linear import Packed
from tests.compare import relative_l2
from tests.core import quantized_cases as cases

# bf16 rounds by up to 2^-9 = 2e-3 what is stored; 1.7e-3 in the mean.
ROUNDING = 2.5e-3


def product(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, bias: Any, **options: Any) -> Tensor:
    """``torch._scaled_mm`` of [M, K] and [K, N], with its limits for scales of rows and columns."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn and a.ndim == b.ndim == 2
    assert a.is_contiguous() and b.t().is_contiguous(), "row by row, and column by column"
    assert not any(x.data_ptr() % 16 for x in (a, b))
    assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert scale_a.is_contiguous() and scale_b.is_contiguous()
    assert options == {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    out = a.double() @ b.double() * scale_a * scale_b
    if bias is not None:
        assert bias.dtype == torch.bfloat16 and bias.shape == b.shape[1:]
        out += bias
    return out.bfloat16()


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", product)
    gc.collect()


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(5,), (5, 3), (3, 5), (4, 4)], ids=str)
def test_products(tokens: tuple[int, ...], bias: bool, one_scale: bool):
    """Batch 2, each stream by its own layer; twice, since column scales are kept."""
    layers = cases.layers("float8", tokens, 32, 64, 2, one_scale, bias, torch.bfloat16)
    for _ in range(2):
        for got, layer in zip(multiply_float8(*zip(*layers, strict=True)), layers, strict=True):
            assert got.shape == (2, layer.x.shape[1], 32) and got.dtype == torch.bfloat16
            assert relative_l2(got, cases.exact_product(*layer)) < ROUNDING


@pytest.mark.parametrize("move", [cases.shifted, cases.spread])
def test_products_of_tensors_anywhere(move):
    """At no multiple of 16 bytes, or in parts of larger tensors."""
    layers = cases.layers("float8", (5, 3), 32, 64, batch=2, dtype=torch.bfloat16)
    want = multiply_float8(*zip(*layers, strict=True))
    moved = [
        cases.Layer(
            x._replace(values=move(x.values), scale=move(x.scale)), cases.with_tensors(packed, move), bias
        )
        for x, packed, bias in layers
    ]
    got = multiply_float8(*zip(*moved, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def weight(scale: Tensor) -> Packed:
    """One of 16 rows, its scale a parameter as a layer has it."""
    return Packed(
        float8, torch.ones(16, 32).to(torch.float8_e4m3fn), nn.Parameter(scale, requires_grad=False)
    )


SHAPES = [(), (1,), (16, 1), (16,)]


def kept() -> int:
    gc.collect()
    return len(scaled_mm._columns)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_scales_are_made_once_and_go_with_their_scale(shape, dtype: torch.dtype, inference: bool):
    """Weights of unloaded models, or that a LoRA replaced, leave nothing behind."""
    before = kept()
    with torch.inference_mode(inference):
        packed = weight(0.5 + torch.rand(shape).to(dtype))
        found = scaled_mm._column_scale(packed)
        assert torch.equal(found, packed.scale.float().reshape(1, -1).expand(1, 16))
        assert found.dtype == torch.float32 and found.is_contiguous()
        again = packed._replace(values=packed.values.clone())
        assert scaled_mm._column_scale(again) is found, "by the scale and nothing else"
    assert kept() == before + 1
    del again
    assert kept() == before + 1, "the scale lives"
    del packed
    assert kept() == before, "not kept by its own columns"
    assert found.isfinite().all(), "who has them may go on"


def test_equal_scales_have_columns_of_their_own():
    before, first, second = kept(), weight(torch.tensor(0.5)), weight(torch.tensor(0.5))
    found = scaled_mm._column_scale(first), scaled_mm._column_scale(second)
    assert torch.equal(*found) and found[0].data_ptr() != found[1].data_ptr()
    assert kept() == before + 2
    del first
    assert kept() == before + 1
    assert scaled_mm._column_scale(second) is found[1]


def test_a_scale_that_moved_has_other_columns():
    """A module that goes to another device, or gets other weights, keeps its parameters."""
    packed = weight(torch.full((16, 1), 0.5))
    found = scaled_mm._column_scale(packed)
    packed.scale.data = torch.full((16, 1), 0.25)
    moved = scaled_mm._column_scale(packed)
    assert (found == 0.5).all() and (moved == 0.25).all()
    assert scaled_mm._column_scale(packed) is moved


def test_what_a_graph_makes_is_its_own(monkeypatch: pytest.MonkeyPatch):
    packed, before = weight(torch.tensor(0.5)), kept()
    with monkeypatch.context() as patch:
        patch.setattr(scaled_mm, "_is_recorded", lambda _: True)
        recorded = scaled_mm._column_scale(packed)
    assert kept() == before
    found = scaled_mm._column_scale(packed)
    assert found is not recorded and kept() == before + 1
    monkeypatch.setattr(scaled_mm, "_is_recorded", lambda _: True)
    assert scaled_mm._column_scale(packed) is found, "made before, it is read"


def test_what_was_made_of_weights():
    """And the memory that it was made of, though the weight itself may go."""
    first, second, other = weight(torch.tensor(0.5)), weight(torch.ones(16, 1)), weight(torch.tensor(1.0))
    found = [scaled_mm._column_scale(packed) for packed in (first, second)]
    weights = [first.values, first.scale, second.values, second.scale, other.scale]
    made = scaled_mm.made_of(weights)
    assert all(a is b for (_, a), b in zip(made, found, strict=True))
    assert [scale.data_ptr() for scale, _ in made] == [first.scale.data_ptr(), second.scale.data_ptr()]
    before = kept()
    del first, second, weights
    assert kept() == before - 2, "what is held is not the weight"
    assert made[0][0].item() == 0.5 and (made[1][1] == 1).all()
