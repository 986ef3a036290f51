"""What a quantised linear is: against comfy_kitchen, SDNQ's formula and fp64, and how files tell of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy_kitchen.backends.eager.convrot_w4a4 import (
    dequantize_convrot_w4a4_weight,
    quantize_convrot_w4a4_weight,
)
from comfy_kitchen.backends.eager.quantization import (
    dequantize_int8_convrot_weight,
    quantize_int8_convrot_weight,
    quantize_int8_rowwise,
)
from comfy_kitchen.tensor.int8_utils import _build_hadamard, _rotate_activation
from torch import Tensor

from lens_core.errors import CheckpointError
from lens_core.kernels import EAGER_LINEAR, Inputs, LinearKernels
from lens_core.kernels.linear import aligned, linear, linears, multiply
from lens_core.quant import linear as quant
from lens_core.quant.layer_format import (
    SCALES,
    LayerFormat,
    affine4,
    float8,
    from_json,
    int8,
    mxfp8,
    nvfp4,
    to_json,
)
from lens_core.quant.linear import Packed
from tests.compare import relative_l2
from tests.core import quantized_cases as cases

TURNED = LayerFormat("int8_tensorwise", 8, rotation=64)
# fp32 rounds by up to 6e-8, and sums of 256 products some times that.
EXACT = 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_rows_are_the_nearest_numbers(kind: str, dtype: torch.dtype):
    x = torch.randn(2, 5, 96).to(dtype)
    x[0, 0] = 0
    x[0, 1] = x[0, 1] * (1e4 if dtype == torch.float16 else 1.4e5)
    rows = quant.quantize_rows(x, kind)
    cases.assert_nearest(rows, x.double(), kind, slack=0)
    assert rows.dtype == dtype and rows.shape == x.shape and rows.device == x.device
    full = quant.dequantize_rows(rows)
    assert full.dtype == dtype and (full[0, 0] == 0).all()
    # Half a step of 1/127 of the largest at most, and 3 bits behind the first.
    assert relative_l2(full, x) < {"int8": 1e-2, "float8": 3e-2}[kind]


def test_int8_rows_are_those_of_comfy_kitchen():
    """But for a row of zeros, whose scale no number sees."""
    x = torch.randn(7, 256)
    rows = quant.quantize_rows(x, "int8")
    values, scale = quantize_int8_rowwise(x)
    assert torch.equal(rows.values, values) and torch.equal(rows.scale, scale)


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_rotations_are_those_of_comfy_kitchen(size: int):
    matrix = quant.hadamard(size)
    assert torch.equal(matrix, _build_hadamard(size))
    x = torch.randn(3, 512)
    turned = quant.rotate(x, size)
    assert relative_l2(turned, _rotate_activation(x, matrix, size)) < EXACT
    assert relative_l2(quant.rotate(turned, size), x) < EXACT, "its own inverse"
    assert quant.rotate(x, 0) is x


@pytest.mark.parametrize("size", [2, 8, 128])
def test_rotations_are_powers_of_four(size: int):
    with pytest.raises(ValueError, match=f"power of 4, not {size}"):
        quant.hadamard(size)


def test_int8_weights_with_rotation_are_those_of_comfy_kitchen():
    weight = torch.randn(24, 512)
    packed = quant.quantize(weight, TURNED)
    values, scale = quantize_int8_convrot_weight(weight, 64)
    # Sums in another order: a number at a tie in some thousands.
    assert (packed.values != values).float().mean() < 1e-3
    assert torch.allclose(packed.scale, scale, rtol=1e-6, atol=0)
    theirs = packed._replace(values=values, scale=scale)
    want = dequantize_int8_convrot_weight(values, scale, 64)
    assert relative_l2(quant.dequantize(theirs, torch.float32), want) < EXACT


def test_w4a4_weights_are_those_of_comfy_kitchen():
    weight = torch.randn(24, 512)
    values, scale = quantize_convrot_w4a4_weight(weight, 64)
    packed = Packed(LayerFormat("convrot_w4a4", 4, rotation=64), values, scale)
    want = dequantize_convrot_w4a4_weight(values, scale, 64)
    assert relative_l2(quant.dequantize(packed, torch.float32), want) < EXACT
    assert relative_l2(want, weight) < 0.2, "steps of a seventh of a row's largest"


@pytest.mark.parametrize("bits", [4, 8])
def test_affine_weights_are_those_of_sdnq(bits: int):
    """Scale (max - min) / 15 and zero point min of each 64 numbers, in bf16; then the nearest numbers."""
    weight = torch.randn(24, 256)
    packed = quant.quantize(weight, LayerFormat(affine4.name, bits, group=64))
    groups = weight.view(24, 4, 64)
    low, high = groups.amin(-1), groups.amax(-1)
    largest = 2**bits - 1
    scale = ((high - low) / largest).bfloat16()
    assert packed.zero is not None and packed.scale.dtype == packed.zero.dtype == torch.bfloat16
    # By its middle and half its width: the last bit of bf16, at most.
    assert torch.allclose(packed.scale.float(), scale.float(), rtol=2**-7, atol=0)
    assert torch.allclose(packed.zero.float(), low.bfloat16().float(), rtol=2**-7, atol=0)
    step, zero = packed.scale.float()[..., None], packed.zero.float()[..., None]
    numbers = ((groups - zero) / step).round().clamp(0, largest)
    want = (numbers * step + zero).view(24, 256)
    assert torch.equal(quant.dequantize(packed, torch.float32), want)
    assert (want - weight).abs().max() <= step.max() * (0.5 + largest * 2**-8)


def test_a_search_finds_smaller_errors():
    weight = torch.randn(24, 256)
    plain, searched = (quant.quantize(weight, affine4, search=search) for search in (False, True))
    errors = [
        (quant.dequantize(packed, torch.float32) - weight).view(24, 4, 64).square().sum(-1)
        for packed in (plain, searched)
    ]
    assert (errors[1] <= errors[0] * (1 + EXACT)).all() and errors[1].sum() < 0.97 * errors[0].sum()


def test_groups_of_equal_numbers():
    """Their step is zero."""
    packed = quant.quantize(torch.full((2, 128), 0.75), affine4, search=True)
    assert (quant.dequantize(packed, torch.float32) == 0.75).all()


@pytest.mark.parametrize("group", [16, 64, 96])
def test_packings(group: int):
    for name, (packed, exact) in cases.weights(5, 192, group).items():
        assert packed.rows == 5
        assert relative_l2(quant.unpack(packed, torch.float32), exact) < EXACT, name
        low = quant.unpack(packed, torch.bfloat16)
        assert torch.equal(low, quant.unpack(packed, torch.float32).bfloat16()), f"{name} is rounded twice"


def test_nibbles_of_either_sign():
    numbers = torch.arange(-8, 8)[None]
    packed = Packed(cases.W4A4, quant.pack_nibbles(numbers), torch.ones(1, 1))
    assert torch.equal(quant.unpack(packed, torch.float32), numbers.float())
    assert quant.pack_nibbles(torch.tensor([1, 2, -1, 0])).tolist() == [0x21, 0x0F]


def test_weights_in_float8_keep_two_digits():
    """Three bits behind the first: an error of 2^-4 at most, 2.6 % in the mean."""
    weight = torch.randn(24, 256)
    packed = quant.quantize(weight, float8)
    assert packed.scale.shape == () and packed.values.float().abs().max() == 448
    assert relative_l2(quant.dequantize(packed, torch.float32), weight) < 3e-2


@pytest.mark.parametrize("form", [mxfp8, nvfp4, cases.W4A4], ids=lambda form: form.name)
def test_formats_that_only_files_have(form: LayerFormat):
    with pytest.raises(ValueError, match=f"{form.name} is not quantised here"):
        quant.quantize(torch.randn(4, 64), form)


FORMS = [float8, int8, TURNED, affine4, LayerFormat(affine4.name, 8, group=32)]


def exact_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """In fp64, of the inputs as they are."""
    out = x.double() @ quant.dequantize(packed, torch.float32).double().T
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name}-{form.bits}-{form.rotation}")
def test_weight_only_linears(form: LayerFormat, bias: bool):
    x, added = torch.randn(2, 5, 256), torch.randn(24) if bias else None
    packed = quant.quantize(torch.randn(24, 256), form)
    got = linear(x, packed, added, EAGER_LINEAR)
    assert got.shape == (2, 5, 24)
    assert relative_l2(got, exact_linear(x, packed, added)) < EXACT
    low = linear(x.bfloat16(), packed, added, EAGER_LINEAR)
    # Inputs, weights, result: 2^-9 each.
    assert low.dtype == torch.bfloat16
    assert relative_l2(low, exact_linear(x, packed, added)) < 8e-3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", [float8, int8, TURNED], ids=lambda form: f"{form.name}-{form.rotation}")
def test_linears_with_quantised_inputs(form: LayerFormat, bias: bool):
    form = form.dynamic(True)
    x, added = torch.randn(2, 5, 256), torch.randn(24) if bias else None
    packed = quant.quantize(torch.randn(24, 256), form)
    kind = EAGER_LINEAR.inputs_of(form, (24, 256))
    assert kind == form.kind
    got = linear(x, packed, added, EAGER_LINEAR)
    rows = quant.quantize_rows(quant.rotate(x, form.rotation), kind or "")
    want = rows.values.double() * rows.scale.double() @ quant.unpack(packed, torch.float32).double().T
    assert relative_l2(got, want if added is None else want + added.double()) < EXACT
    assert torch.equal(linear(rows, packed, added, EAGER_LINEAR), got), "inputs that are quantised already"
    # What is rounded are the inputs: 0.7 % and 2.6 % of them.
    assert relative_l2(got, exact_linear(x, packed, added)) < {"int8": 1.2e-2, "float8": 4e-2}[form.kind]


def test_rows_in_bfloat16_give_bfloat16():
    packed = quant.quantize(torch.randn(24, 256), int8.dynamic(True))
    assert linear(torch.randn(1, 5, 256).bfloat16(), packed, None, EAGER_LINEAR).dtype == torch.bfloat16


def test_inputs_are_quantised_only_where_the_format_says_so():
    assert EAGER_LINEAR.inputs_of(int8, (24, 64)) is None
    assert EAGER_LINEAR.inputs_of(int8.dynamic(True), (24, 64)) == "int8"
    assert affine4.dynamic(True) == affine4 and int8.dynamic(True).dynamic(False) == int8


def asked() -> tuple[LinearKernels, list[tuple[str, int]]]:
    """The definitions, and which of them were asked for how many streams."""
    calls: list[tuple[str, int]] = []

    def noting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(streams: Sequence[Any], *rest: Any) -> Any:
            calls.append((name, len(streams)))
            return run(streams, *rest)

        return noted

    kernels = replace(
        EAGER_LINEAR,
        quantize_rows=noting("rows", EAGER_LINEAR.quantize_rows),
        unpack=noting("unpack", EAGER_LINEAR.unpack),
        multiply={kind: noting(kind, run) for kind, run in EAGER_LINEAR.multiply.items()},
    )
    return kernels, calls


@pytest.mark.parametrize("form", [*FORMS, *(form.dynamic(True) for form in FORMS[:3])], ids=str)
@pytest.mark.parametrize("tokens", [(5,), (5, 3), (3, 5), (4, 4)], ids=str)
def test_streams_have_layers_of_their_own(tokens: tuple[int, ...], form: LayerFormat):
    """All through one call of each operation, each with its own weight and bias."""
    kernels, calls = asked()
    streams = [torch.randn(2, count, 256) for count in tokens]
    weights = [quant.quantize(torch.randn(24, 256), form) for _ in tokens]
    biases = [torch.randn(24) for _ in tokens]
    count = len(tokens)
    for added in (biases, [None] * count):
        calls.clear()
        found = linears(streams, weights, added, kernels)
        names = ["rows", str(form.inputs)] if form.inputs else ["unpack"]
        assert calls == [(name, count) for name in names]
        for got, *layer in zip(found, streams, weights, added, strict=True):
            assert relative_l2(got, exact_linear(*layer)) < (4e-2 if form.inputs else EXACT)
            assert torch.equal(got, linear(*layer, EAGER_LINEAR))
    if form.inputs:
        calls.clear()
        rows = [quant.quantize_rows(quant.rotate(x, form.rotation), form.inputs) for x in streams]
        again = linears(rows, weights, added, kernels)
        assert calls == [(form.inputs, count)], "they are quantised already"
        assert all(torch.equal(got, same) for got, same in zip(again, found, strict=True))


def unlike() -> dict[str, list[tuple[Inputs, Packed, Tensor | None]]]:
    """Two streams [1, T, 256] whose layers are not alike, by what they differ in."""
    image, text = torch.randn(1, 5, 256), torch.randn(1, 3, 256)
    dynamic = int8.dynamic(True)
    weights = [quant.quantize(torch.randn(24, 256), form) for form in (float8.dynamic(True), dynamic)]
    first, second = weights[1], quant.quantize(torch.randn(24, 256), dynamic)
    turned = quant.quantize(torch.randn(24, 256), TURNED.dynamic(True))
    wide = quant.quantize(torch.randn(48, 256), dynamic)
    bias = torch.randn(24)
    return {
        "formats": [(image, weights[0], bias), (text, second, bias)],
        "rotations": [(image, first, bias), (text, turned, bias)],
        "whether inputs are quantised": [(image, first, bias), (text, second._replace(form=int8), bias)],
        "outputs": [(image, first, bias), (text, wide, torch.randn(48))],
        "scales": [(image, first, bias), (text, second._replace(scale=second.scale.mean()), bias)],
        "inputs": [(quant.quantize_rows(image, "int8"), first, bias), (text, second, bias)],
        "biases": [(image, first, bias), (text, second, None)],
    }


@pytest.mark.parametrize("what", unlike())
@pytest.mark.parametrize("turned", [False, True], ids=["", "text first"])
def test_layers_that_are_not_alike_go_alone(what: str, turned: bool):
    layers = unlike()[what][:: -1 if turned else 1]
    kernels, calls = asked()
    found = linears(*zip(*layers, strict=True), kernels)
    assert {count for _, count in calls} == {1}
    for got, layer in zip(found, layers, strict=True):
        assert torch.equal(got, linear(*layer, EAGER_LINEAR))


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("one_scale", [False, True])
def test_the_definition_of_products(kind: str, one_scale: bool):
    """In fp64, of each stream's own."""
    layers = cases.layers(kind, (5, 3), 24, 64, batch=2, one_scale=one_scale, dtype=torch.float32)
    for got, layer in zip(multiply(*zip(*layers, strict=True)), layers, strict=True):
        assert relative_l2(got, cases.exact_product(*layer)) < EXACT


def test_what_loads_of_16_bytes_need():
    x = torch.randn(8, 16)
    assert aligned(x) is x
    for other in (cases.shifted(x), cases.spread(x), x.t().contiguous().t()):
        got = aligned(other)
        assert torch.equal(got, x) and got.is_contiguous() and got.data_ptr() % 16 == 0


def raw(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "form",
    [
        *FORMS,
        *(form.dynamic(True) for form in FORMS[:3]),
        *(mxfp8, nvfp4, cases.E5M2, LayerFormat("convrot_w4a4", 4, rotation=256)),
    ],
    ids=str,
)
def test_files_tell_of_every_format(form: LayerFormat):
    assert from_json(to_json(form), "blocks.0") == form
    assert form.name in SCALES


def test_what_comfyui_writes():
    """Formats with dynamic inputs say nothing of it; ConvRot's size stands beside the format or in params."""
    assert from_json(raw('{"format": "float8_e4m3fn"}'), "x") == float8.dynamic(True)
    plain = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert from_json(raw(json.dumps(plain)), "x") == float8
    for entry in (
        {"convrot": True, "convrot_groupsize": 64},
        {"params": {"convrot": True, "convrot_groupsize": 64}},
    ):
        found = from_json(raw(json.dumps({"format": "int8_tensorwise"} | entry)), "x")
        assert found == TURNED.dynamic(True)
    assert from_json(raw('{"format": "convrot_w4a4"}'), "x").rotation == 256
    assert from_json(raw('{"format": "int8_tensorwise", "convrot": true}'), "x").rotation == 256


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"float8"', "{}", '{"format": "lens_affine", "bits": "four"}', "\udcff"]
)
def test_entries_that_say_nothing(text: str):
    entry = torch.tensor([255, 254], dtype=torch.uint8) if text == "\udcff" else raw(text)
    with pytest.raises(CheckpointError) as raised:
        from_json(entry, "blocks.3.attn.img_qkv")
    start = "The layer blocks.3.attn.img_qkv says by its comfy_quant that it is quantised, but not how ("
    assert str(raised.value).startswith(start) and str(raised.value).endswith("Download the file again.")


def test_formats_of_later_versions():
    with pytest.raises(CheckpointError) as raised:
        from_json(raw('{"format": "int3_row"}'), "blocks.3")
    assert str(raised.value) == (
        f"The layer blocks.3 is quantised as 'int3_row'; this version reads {', '.join(SCALES)}. "
        "Choose another file."
    )
