"""mxfp8 and nvfp4 without comfy-kitchen: what they mean against comfy_kitchen, and that it is not asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.float_utils import to_blocked
from torch import Tensor

from lens_core.kernels import EAGER_LINEAR, linear_registry
from lens_core.kernels import linear as linears
from lens_core.quant import block_scales, kitchen
from lens_core.quant import linear as quant
from lens_core.quant.layer_format import LayerFormat, affine4, int8, mxfp8, nvfp4
from lens_core.quant.linear import Packed
from tests.compare import relative_l2
from tests.core import quantized_cases as cases

FORMS = {"mxfp8": mxfp8, "nvfp4": nvfp4}
SIZES = [(96, 1536), (32, 4096), (384, 96), (160, 32)]  # padded rows; 3 groups of 32 are no whole tile


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> LayerFormat:
    return FORMS[request.param]


def theirs(packed: Packed, dtype: torch.dtype) -> Tensor:
    """By comfy-kitchen's plain PyTorch, which is not the pack's."""
    with comfy_kitchen.use_backend("eager"):
        if packed.form == nvfp4:
            return comfy_kitchen.dequantize_nvfp4(packed.values, packed.zero, packed.scale, dtype)
        scale = packed.scale.view(torch.float8_e8m0fnu)
        return comfy_kitchen.dequantize_mxfp8(packed.values, scale, dtype)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_weights_are_those_of_comfy_kitchen(form: LayerFormat, rows: int, columns: int):
    weight = torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None]
    packed = kitchen.quantize(weight, form)
    wide = quant.unpack(packed, torch.float32)
    assert torch.equal(wide, theirs(packed, torch.float32))
    assert torch.equal(quant.dequantize(packed, torch.float32), wide)
    # e4m3 rounds by 2^-4 at most; e2m1 by a quarter, and most of these rows' scales with a few bits.
    assert 1e-2 < relative_l2(wide, weight) < (5e-2 if form == mxfp8 else 0.2)
    for dtype in (torch.bfloat16, torch.float16):
        got = quant.unpack(packed, dtype)
        assert got.dtype == dtype and torch.equal(got, wide.to(dtype)), "rounded once"
        if form == mxfp8:
            assert torch.equal(got, theirs(packed, dtype))
        else:  # which rounds its factor, its scale and their product as well: 2^-9 or 2^-12 each
            apart = relative_l2(got, theirs(packed, dtype))
            assert 0 < apart < (6e-3 if dtype == torch.bfloat16 else 8e-4)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (128, 4), (96, 6), (129, 5), (300, 96)])
def test_the_order_of_scales_is_that_of_comfy_kitchen(rows: int, groups: int):
    scales = torch.randint(0, 256, (rows, groups), dtype=torch.uint8)
    blocked = to_blocked(scales, flatten=False)
    assert torch.equal(block_scales.unblock(blocked, rows, groups), scales)
    floats = block_scales.unblock(blocked.view(torch.float8_e4m3fn), rows, groups)
    assert torch.equal(floats.view(torch.uint8), scales)


def test_every_power_of_2():
    """2^-127 is subnormal (comfy-kitchen has 0 there, and infinity for 255)."""
    byte = torch.arange(256, dtype=torch.uint8)
    got = block_scales.power_of_2(byte)
    assert got[:255].double().log2().tolist() == [power - 127 for power in range(255)] and got[255].isnan()
    torch.testing.assert_close(got, byte.view(torch.float8_e8m0fnu).float(), rtol=0, atol=0, equal_nan=True)


def test_every_nibble_the_first_in_the_high_bits():
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    got = block_scales.float4(torch.arange(256, dtype=torch.uint8))
    assert got.tolist() == [number for high in numbers for low in numbers for number in (high, low)]


def test_every_8_bit_float():
    values = torch.arange(256, dtype=torch.uint8).view(8, 32).view(torch.float8_e4m3fn)
    packed = Packed(mxfp8, values, torch.full((128, 4), 127, dtype=torch.uint8))
    got = quant.unpack(packed, torch.float32)
    torch.testing.assert_close(got, values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def no_kitchen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("comfy-kitchen is asked")

    monkeypatch.setattr(kitchen, "_kitchen", refuse)


def test_linears_unpack_where_nothing_multiplies_the_format(form: LayerFormat, request):
    weights = [kitchen.quantize(torch.randn(96, 256), form) for _ in range(2)]
    request.getfixturevalue("no_kitchen")
    biases = [torch.randn(96), torch.randn(96)]
    streams = [torch.randn(2, tokens, 256) for tokens in (5, 3)]
    calls: list[int] = []

    def unpack(weights: list[Packed], dtype: torch.dtype) -> list[Tensor]:
        calls.append(len(weights))
        return linears.unpack(weights, dtype)

    got = linears.linears(streams, weights, biases, replace(EAGER_LINEAR, unpack=unpack))
    assert calls == [2], "image and text together"
    for out, x, packed, bias in zip(got, streams, weights, biases, strict=True):
        want = x.double() @ quant.unpack(packed, torch.float32).double().T
        # fp32's sums of 256 products.
        assert relative_l2(out, want if bias is None else want + bias.double()) < 1e-6


@pytest.mark.parametrize(
    ("capability", "hip", "full_precision", "want"),
    [
        ((12, 0), None, False, True),
        ((10, 0), None, False, True),
        ((10, 0), None, True, False),
        ((9, 0), None, False, False),
        ((8, 0), None, False, False),
        ((12, 0), "7.0", False, False),
    ],
)
def test_who_multiplies_the_format(form, capability, hip, full_precision, want, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(kitchen, "linear", lambda x, packed, bias: "comfy-kitchen's")
    monkeypatch.setattr(linears, "_weight_only", lambda *_: ["ours"])
    kitchen._capability.cache_clear()
    try:
        wanted = replace(form, full_precision=full_precision)
        assert kitchen.multiplies(wanted, torch.device("cuda", 0)) is want
        assert not kitchen.multiplies(wanted, torch.device("cpu"))
        assert not kitchen.multiplies(affine4, torch.device("cuda", 0))
        asked = [kitchen.multiplies(wanted, torch.device("cuda", 0)) for _ in range(2)]
        monkeypatch.setattr(kitchen, "multiplies", lambda *_: asked[0])
        x, packed = torch.ones(1, 2, 64), Packed(wanted, *cases.block_scaled(32, 64)[form.name][1:])
        out = linears.linears([x], [packed], [None], EAGER_LINEAR)
        assert out == ["comfy-kitchen's" if want else "ours"]
    finally:
        kitchen._capability.cache_clear()


def test_the_self_test_notices_a_wrong_order_of_scales(monkeypatch: pytest.MonkeyPatch):
    """The definitions themselves, with two rows' scales exchanged in one format."""
    right = replace(EAGER_LINEAR, multiply={})
    monkeypatch.setattr(linear_registry, "triton_linear_kernels", lambda: right)
    assert linear_registry.difference(torch.device("cpu"), torch.bfloat16) == 0
    for wrong in FORMS.values():

        def unpack(weights: list[Packed], dtype: torch.dtype, wrong: LayerFormat = wrong) -> list[Tensor]:
            if weights[0].form == wrong:
                weights = [packed._replace(scale=packed.scale.roll(1, 0)) for packed in weights]
            return linears.unpack(weights, dtype)

        spoilt = replace(right, unpack=unpack)
        monkeypatch.setattr(linear_registry, "triton_linear_kernels", lambda spoilt=spoilt: spoilt)
        assert linear_registry.difference(torch.device("cpu"), torch.bfloat16) > 0.1


def test_other_formats_are_not_meant():
    assert not block_scales.has(int8) and not block_scales.has(affine4) and not kitchen.has(int8)
    assert {name for name in FORMS if kitchen.has(FORMS[name])} == block_scales.FORMATS
