"""Rows quantised and weights unpacked, of the image alone or of image and text in one launch: against fp64,
against the definitions, and what the kernels touch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lens_core.kernels.triton import linear_launch
from lens_core.quant import linear as quant
from lens_core.quant.layer_format import AFFINE, LayerFormat, float8
from lens_core.quant.linear import Packed, QuantizedRows
from tests.compare import relative_l2
from tests.core import quantized_cases as cases

KINDS = ("int8", "float8")
DTYPES = (torch.float16, torch.bfloat16)
# fp16 rounds what is stored by up to 2^-11 = 5e-4, 2e-4 in the mean. Measured: 2.1e-4.
ROUNDING = 3e-4

pytestmark = pytest.mark.usefixtures("float8_of_torch")


def rows_of(x: Tensor, kind: str) -> QuantizedRows:
    (rows,) = linear_launch.quantize_rows([x], kind)
    return rows


def check_rows(streams: Sequence[Tensor], kind: str) -> None:
    found = linear_launch.quantize_rows(streams, kind)
    assert len(found) == len(streams)
    for x, got in zip(streams, found, strict=True):
        want = quant.quantize_rows(x, kind)
        cases.assert_nearest(got, x.double(), kind, slack=0)
        assert got.dtype == want.dtype == x.dtype and got.values.dtype == want.values.dtype
        assert torch.equal(got.scale, want.scale)
        # A reciprocal or a division: their last bit decides ties alone, of which 16-bit inputs have a few in
        # a thousand. Both ways are as near, as was asserted.
        assert (got.values.float() != want.values.float()).float().mean() < 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1536), (2, 5, 341), (3, 4096), (2, 3, 4), (40, 7, 1)], ids=str)
def test_rows(shape: tuple[int, ...], dtype: torch.dtype, kind: str):
    check_rows([torch.randn(shape).to(dtype)], kind)


# Two rows are a program's share: one, two and three rows of either stream.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [(1, 1), (1, 3), (3, 1), (2, 2), (3, 3), (7, 2)], ids=str)
def test_rows_of_image_and_text(tokens: tuple[int, int], batch: int, kind: str):
    check_rows([torch.randn(batch, count, 96).half() for count in tokens], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("move", [cases.shifted, cases.spread])
def test_rows_of_any_layout(move, kind: str):
    """Beside each other at no multiple of 16 bytes, or not beside each other."""
    image, text = torch.randn(2, 5, 96).half(), torch.randn(2, 3, 96).half()
    for streams in ([move(image)], [move(image), text], [image, move(text)], [move(image), move(text)]):
        check_rows(streams, kind)
    check_rows([torch.randn(96, 3).half().t()], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_very_large_and_small_numbers(kind: str):
    """1.4e5 is what the checkpoint's reach; 1e-38 stays itself in no kind, but breaks nothing."""
    x = torch.randn(5, 96)
    x *= torch.tensor([0, 1.4e5, 1e30, 1e-30, 1e-38])[:, None]
    x = x.bfloat16()
    for got in linear_launch.quantize_rows([x, x], kind):
        want = quant.quantize_rows(x, kind)
        assert torch.equal(got.scale, want.scale) and torch.equal(got.values.float(), want.values.float())
        large = QuantizedRows(got.values[1:3], got.scale[1:3], got.dtype)
        cases.assert_nearest(large, x[1:3].double(), kind, slack=0)
        assert (quant.dequantize_rows(got)[[0, 4]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_to_nearest_even(kind: str):
    """A row's largest number of the kind makes its scale one."""
    ties = [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5, 0.0] if kind == "int8" else [17, 19, 34, 38, -17, 420]
    x = torch.tensor([[cases.LARGEST[kind], *ties]]).float()
    got = rows_of(x, kind)
    nearest = [0, 2, 2, 0, -2, 126, -126, 0] if kind == "int8" else [16, 20, 32, 40, -16, 416]
    assert got.scale.item() == 1 and got.values[0, 1:].float().tolist() == nearest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_row_with_nan_or_infinity_is_seen(value: float, kind: str):
    """By its scale: integers have no such number."""
    x = torch.randn(3, 96).half()
    x[1, 40] = value
    for got in linear_launch.quantize_rows([x, x], kind):
        assert not got.scale[1].isfinite() and quant.dequantize_rows(got)[1, 40].isnan()
        assert quant.dequantize_rows(got)[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shapes", [[(3, 341)], [(2, 4, 96)], [(2, 4, 96), (2, 3, 96)], [(1, 1, 341), (1, 5, 341)]], ids=str
)
def test_rows_write_their_results_alone(shapes: list[tuple[int, ...]], kind: str, fences):
    streams = [torch.randn(shape).half() for shape in shapes]
    fenced = [fences.around(x) for x in streams]
    for got, x, held in zip(linear_launch.quantize_rows(fenced, kind), streams, fenced, strict=True):
        cases.assert_nearest(got, x.double(), kind, slack=0)
        assert torch.equal(held, x)
    fences.assert_intact()


def check_weights(weights: Sequence[tuple[Packed, Tensor]], name: str) -> None:
    """Unpacked into any dtype by one launch."""
    packed = [held for held, _ in weights]
    wide = linear_launch.unpack(packed, torch.float32)
    half = linear_launch.unpack(packed, torch.float16)
    low = linear_launch.unpack(packed, torch.bfloat16)
    assert len(wide) == len(half) == len(low) == len(weights)
    for index, (held, exact) in enumerate(weights):
        # A product and a sum in fp32, as the definition has them.
        assert torch.equal(wide[index], quant.unpack(held, torch.float32)), name
        assert relative_l2(wide[index], exact) < 1e-7, name
        assert half[index].dtype == torch.float16 and torch.equal(half[index], wide[index].half()), name
        # The interpreter cuts fp32 to bf16: the last of 8 bits.
        assert low[index].dtype == torch.bfloat16, name
        error = (low[index].float() - wide[index]).abs()
        assert (error <= wide[index].abs() * 2**-7).all(), name


# As wide as Lens' and as no power of two; groups that are none, or a whole row.
SIZES = [(5, 384, group) for group in (16, 32, 64, 128)] + [
    *((3, 1536, 64), (2, 4096, 32), (1, 96, 96), (7, 48, 24), (3, 30, 10), (5, 341, 341), (1, 2, 2))
]


@pytest.mark.parametrize(("rows", "columns", "group"), SIZES)
def test_weights(rows: int, columns: int, group: int):
    for name, pair in cases.pairs(rows, columns, group).items():
        check_weights(pair[:1], name)
        check_weights(pair, name)


def test_bytes_that_are_called_signed_hold_two_numbers_as_others_do():
    """The upper must not bring the sign along."""
    (first, exact), (second, other) = cases.pairs(4, 64, 32)["w4a4 as int8"]
    second = second._replace(values=second.values.view(torch.uint8))
    assert first.values.dtype == torch.int8
    for weights in ([(first, exact), (second, other)], [(second, other), (first, exact)]):
        check_weights(weights, "w4a4")


@pytest.mark.parametrize("move", [cases.shifted, lambda x: x])
def test_weights_anywhere(move):
    """None, one or the other at no multiple of 16 bytes."""
    for name, ((first, exact), (second, other)) in cases.pairs(5, 96, 32).items():
        moved = cases.with_tensors(first, move)
        check_weights([(moved, exact)], name)
        check_weights([(moved, exact), (second, other)], name)
        check_weights([(second, other), (moved, exact)], name)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_8_bit_float(dtype: torch.dtype):
    """Small, infinite and no numbers, too."""
    values = torch.arange(256, dtype=torch.uint8).view(16, 16).view(dtype)
    packed = Packed(float8, values, torch.tensor(1.0))
    for got in linear_launch.unpack([packed, packed], torch.float32):
        want = values.float()
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(0), want.nan_to_num(0))


def test_pairs_that_lie_in_two_groups_are_left_to_the_definition():
    form = LayerFormat(AFFINE, 4, 3)
    weights = [
        Packed(form, torch.randint(0, 256, (4, 9), dtype=torch.uint8), torch.rand(4, 6), torch.rand(4, 6))
        for _ in range(2)
    ]
    for got, packed in zip(linear_launch.unpack(weights, torch.float32), weights, strict=True):
        assert torch.equal(got, quant.unpack(packed, torch.float32))


def test_weights_write_their_results_alone(fences):
    for name, pair in cases.pairs(5, 96, 32).items():
        for weights in (pair[:1], pair):
            fenced = [cases.with_tensors(packed, fences.around) for packed, _ in weights]
            found = linear_launch.unpack(fenced, torch.float16)
            for got, held, (packed, exact) in zip(found, fenced, weights, strict=True):
                assert relative_l2(got, exact) < ROUNDING, name
                assert all(
                    torch.equal(now.view(torch.uint8), was.contiguous().view(torch.uint8))
                    for now, was in zip(held[1:], packed[1:], strict=True)
                    if was is not None and was.dim()
                )
    fences.assert_intact()
