"""Kernels of quantised linears: against fp64, against their definitions, and what they touch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens_core.kernels import linear as definitions
from lens_core.kernels.triton import linear_launch
from lens_core.quant import linear as quant
from lens_core.quant.layer_format import AFFINE, LayerFormat, float8, int8
from lens_core.quant.linear import Packed, QuantizedRows
from tests.compare import relative_l2
from tests.core import quantized_cases as cases

KINDS = ("int8", "float8")
DTYPES = (torch.float16, torch.bfloat16)
# fp16 rounds what is stored by up to 2^-11 = 5e-4, 2e-4 in the mean. Measured: 2.1e-4.
ROUNDING = 3e-4

pytestmark = pytest.mark.usefixtures("float8_of_torch")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1536), (2, 5, 341), (3, 4096), (2, 3, 4), (1, 7, 1)], ids=str)
def test_rows(shape: tuple[int, ...], dtype: torch.dtype, kind: str):
    x = torch.randn(shape).to(dtype)
    got, want = linear_launch.quantize_rows(x, kind), quant.quantize_rows(x, kind)
    cases.assert_nearest(got, x.double(), kind, slack=0)
    assert got.dtype == want.dtype == dtype and got.values.dtype == want.values.dtype
    assert torch.equal(got.scale, want.scale)
    # A reciprocal or a division: their last bit decides ties alone, of which 16-bit inputs have a few in a
    # thousand. Both ways are as near, as was asserted.
    assert (got.values.float() != want.values.float()).float().mean() < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_very_large_and_small_numbers(kind: str):
    """1.4e5 is what the checkpoint's reach; 1e-38 stays itself in no kind, but breaks nothing."""
    x = torch.randn(5, 96)
    x *= torch.tensor([0, 1.4e5, 1e30, 1e-30, 1e-38])[:, None]
    x = x.bfloat16()
    got, want = linear_launch.quantize_rows(x, kind), quant.quantize_rows(x, kind)
    assert torch.equal(got.scale, want.scale) and torch.equal(got.values.float(), want.values.float())
    cases.assert_nearest(
        QuantizedRows(got.values[1:3], got.scale[1:3], got.dtype), x[1:3].double(), kind, slack=0
    )
    assert (quant.dequantize_rows(got)[[0, 4]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_to_nearest_even(kind: str):
    """A row's largest number of the kind makes its scale one."""
    ties = [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5, 0.0] if kind == "int8" else [17, 19, 34, 38, -17, 420]
    x = torch.tensor([[cases.LARGEST[kind], *ties]]).float()
    got = linear_launch.quantize_rows(x, kind)
    nearest = [0, 2, 2, 0, -2, 126, -126, 0] if kind == "int8" else [16, 20, 32, 40, -16, 416]
    assert got.scale.item() == 1 and got.values[0, 1:].float().tolist() == nearest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_row_with_nan_or_infinity_is_seen(value: float, kind: str):
    """By its scale: integers have no such number."""
    x = torch.randn(3, 96).half()
    x[1, 40] = value
    got = linear_launch.quantize_rows(x, kind)
    assert not got.scale[1].isfinite() and quant.dequantize_rows(got)[1, 40].isnan()
    assert quant.dequantize_rows(got)[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 341), (2, 4, 96)], ids=str)
def test_rows_write_their_results_alone(shape: tuple[int, ...], kind: str, fences):
    x = torch.randn(shape).half()
    fenced = fences.around(x)
    cases.assert_nearest(linear_launch.quantize_rows(fenced, kind), x.double(), kind, slack=0)
    assert torch.equal(fenced, x)
    fences.assert_intact()


def test_rows_of_any_layout():
    x = torch.randn(96, 3).half().t()
    cases.assert_nearest(linear_launch.quantize_rows(x, "int8"), x.double(), "int8", slack=0)


def check_weights(rows: int, columns: int, group: int) -> None:
    for name, (packed, exact) in cases.weights(rows, columns, group).items():
        wide = linear_launch.unpack(packed, torch.float32)
        # A product and a sum in fp32, as the definition has them.
        assert torch.equal(wide, quant.unpack(packed, torch.float32)), name
        assert relative_l2(wide, exact) < 1e-7, name
        half = linear_launch.unpack(packed, torch.float16)
        assert half.dtype == torch.float16 and torch.equal(half, wide.half()), name
        # The interpreter cuts fp32 to bf16: the last of 8 bits.
        low = linear_launch.unpack(packed, torch.bfloat16)
        assert low.dtype == torch.bfloat16, name
        assert ((low.float() - wide).abs() <= wide.abs() * 2**-7).all(), name


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_weights(group: int):
    check_weights(5, 384, group)


@pytest.mark.parametrize(
    ("rows", "columns", "group"),
    [(3, 1536, 64), (2, 4096, 32), (1, 96, 96), (7, 48, 24), (3, 30, 10), (5, 341, 341), (1, 2, 2)],
)
def test_weights_of_any_size(rows: int, columns: int, group: int):
    """As wide as Lens' and as no power of two; groups that are none, or a whole row."""
    check_weights(rows, columns, group)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_8_bit_float(dtype: torch.dtype):
    """Small, infinite and no numbers, too."""
    values = torch.arange(256, dtype=torch.uint8).view(16, 16).view(dtype)
    packed = Packed(float8, values, torch.tensor(1.0))
    got, want = linear_launch.unpack(packed, torch.float32), values.float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0), want.nan_to_num(0))


def test_pairs_that_lie_in_two_groups_are_left_to_the_definition():
    values = torch.randint(0, 256, (4, 9), dtype=torch.uint8)
    packed = Packed(LayerFormat(AFFINE, 4, 3), values, torch.rand(4, 6), torch.rand(4, 6))
    assert torch.equal(linear_launch.unpack(packed, torch.float32), quant.unpack(packed, torch.float32))


def test_weights_write_their_results_alone(fences):
    for name, (packed, exact) in cases.weights(5, 96, 32).items():
        fenced = packed._replace(
            **{key: fences.around(x) for key, x in packed._asdict().items() if isinstance(x, Tensor)}
        )
        assert relative_l2(linear_launch.unpack(fenced, torch.float16), exact) < ROUNDING, name
        assert all(
            torch.equal(now.view(torch.uint8), was.contiguous().view(torch.uint8))
            for now, was in zip(fenced[1:], packed[1:], strict=True)
            if was is not None and was.dim()
        )
    fences.assert_intact()


@pytest.fixture(params=["pointers", "descriptors", "descriptors in turn"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By pointers; by descriptors with a program a tile, or with 2 programs for all."""
    if request.param != "pointers":
        monkeypatch.setattr(linear_launch, "on_hopper", lambda _: True)
        programs = 2 if "turn" in request.param else 1000
        monkeypatch.setattr(linear_launch, "multiprocessors", lambda _: programs)
    return request.param


def rows_and_weight(
    shape: tuple[int, ...], n: int, one_scale: bool = False, dtype: torch.dtype = torch.float16
) -> tuple[QuantizedRows, Packed, Tensor]:
    """Random numbers, scales that make results of about one, and a bias."""
    values = torch.randint(-127, 128, shape, dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, shape[-1]), dtype=torch.int8)
    size = 1 / (73 * shape[-1] ** 0.25)  # uniform numbers up to 127 have a spread of 73
    scale = torch.tensor(size) if one_scale else size * (0.5 + torch.rand(n, 1))
    x = QuantizedRows(values, size * (0.5 + torch.rand(*shape[:-1], 1)), dtype)
    return x, Packed(int8, weight, scale), torch.randn(n)


def exact_product(x: QuantizedRows, packed: Packed, bias: Tensor | None) -> Tensor:
    rows = x.values.double() * x.scale.double()
    out = rows @ (packed.values.double() * packed.scale.double()).T
    return out if bias is None else out + bias.double()


# 64 or 128 rows, 128 or 256 columns and 64 or 128 inputs are a step's share: at their ends and elsewhere.
@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ((1, 1, 64), 128),
        ((2, 19, 144), 96),
        ((65, 48), 304),
        ((2, 64, 128), 256),
        ((1, 129, 384), 8),
        ((300, 16), 520),
    ],
    ids=str,
)
@pytest.mark.parametrize("one_scale", [False, True])
def test_products(shape: tuple[int, ...], n: int, one_scale: bool, way: str):
    x, packed, bias = rows_and_weight(shape, n, one_scale)
    assert linear_launch.why_not_multiply(packed) is None
    for added in (bias.half(), bias, None):
        got = linear_launch.multiply(x, packed, added)
        assert got.shape == (*shape[:-1], n) and got.dtype == x.dtype
        assert relative_l2(got, exact_product(x, packed, added)) < ROUNDING
        assert relative_l2(got, definitions.multiply(x, packed, added)) < ROUNDING


def test_products_in_bfloat16(way: str):
    x, packed, bias = rows_and_weight((1, 37, 64), 96, dtype=torch.bfloat16)
    got = linear_launch.multiply(x, packed, bias.bfloat16())
    assert got.dtype == torch.bfloat16
    # The interpreter cuts fp32 to bf16, see test_block.py.
    assert relative_l2(got, exact_product(x, packed, bias.bfloat16())) < 5e-3


def test_the_largest_sums(way: str):
    """4096 products of 127 and 127: an integer of 66 million, whose last bits fp32 cannot keep."""
    x, packed, _ = rows_and_weight((3, 4096), 8)
    x.values.fill_(127)
    packed.values.fill_(-127)
    got = linear_launch.multiply(x, packed, None)
    assert relative_l2(got, exact_product(x, packed, None)) < ROUNDING


def test_products_of_any_layout(way: str):
    """Parts of larger tensors, and weights that do not begin at multiples of 16 bytes."""
    x, packed, bias = rows_and_weight((2, 5, 64), 96)
    want = linear_launch.multiply(x, packed, bias)
    values = torch.empty(2, 9, 64, dtype=torch.int8)[:, 2:7].copy_(x.values)
    scales = torch.empty(2, 5, 3)[..., 1:2].copy_(x.scale)
    weight = torch.empty(96 * 64 + 1, dtype=torch.int8)[1:].view(96, 64).copy_(packed.values)
    got = linear_launch.multiply(
        QuantizedRows(values, scales, x.dtype), packed._replace(values=weight), bias.repeat(2)[:96]
    )
    assert torch.equal(got, want)


def test_products_write_their_results_alone(way: str, fences):
    x, packed, bias = rows_and_weight((2, 19, 144), 96)
    fenced = QuantizedRows(fences.around(x.values), fences.around(x.scale), x.dtype)
    weight = packed._replace(values=fences.around(packed.values), scale=fences.around(packed.scale))
    got = linear_launch.multiply(fenced, weight, fences.around(bias.half()))
    assert relative_l2(got, exact_product(x, packed, bias.half())) < ROUNDING
    assert torch.equal(fenced.values, x.values) and torch.equal(weight.values, packed.values)
    fences.assert_intact()


@pytest.mark.parametrize(("rows", "columns"), [(96, 341), (100, 64), (96, 24)])
def test_sizes_that_are_not_multiplied(rows: int, columns: int):
    packed = Packed(int8, torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows, 1))
    reason = f"a layer has {columns} inputs and {rows} outputs, no multiples of 16 and 8"
    assert linear_launch.why_not_multiply(packed) == reason


def test_linears_of_every_format():
    """The one way through them, by this backend."""
    kernels = definitions.LinearKernels(
        "triton", linear_launch.quantize_rows, linear_launch.unpack, {"int8": linear_launch.multiply}
    )
    x, weight, bias = torch.randn(2, 5, 256).half(), torch.randn(96, 256), torch.randn(96)
    turned = LayerFormat("int8_tensorwise", 8, rotation=64)
    for form in (int8, turned, int8.dynamic(True), turned.dynamic(True)):
        packed = quant.quantize(weight, form)
        got = definitions.linear(x, packed, bias, kernels)
        want = definitions.linear(x.float(), packed, bias, definitions.EAGER_LINEAR)
        # fp16 rounds inputs (turned ones before they are quantised, some of which then go the other way:
        # 1e-3), weights and result.
        assert relative_l2(got, want) < (3e-3 if form.inputs else 6e-4), form
