"""The kernel that unpacks mxfp8 and nvfp4: against its definitions, and what it touches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens_core.kernels.triton import linear_launch
from lens_core.quant import linear as quant
from lens_core.quant.layer_format import mxfp8, nvfp4
from lens_core.quant.linear import Packed
from tests.core import quantized_cases as cases

# Lens' widths, rows that fill no tile, 3, 5 and 6 groups, rows of one group, and such beyond a tile.
SIZES = [(96, 768), (5, 1024), (384, 96), (130, 160), (33, 96), (1, 32), (290, 32)]


def same(got: Tensor, want: Tensor) -> bool:
    """Every bit, but for those of what is no number."""
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(0), want.nan_to_num(0))


def assert_is_the_definition(weights: list[Packed]) -> None:
    wide = [quant.unpack(packed, torch.float32) for packed in weights]
    for got in (
        linear_launch.unpack(weights, torch.float32),
        linear_launch.unpack(weights[:1], torch.float32),
    ):
        assert all(map(same, got, wide))
    for got, want in zip(linear_launch.unpack(weights, torch.float16), wide, strict=True):
        assert got.dtype == torch.float16 and same(got, want.half())
    for got, want in zip(linear_launch.unpack(weights, torch.bfloat16), wide, strict=True):
        assert got.dtype == torch.bfloat16
        # The interpreter cuts fp32 to bf16: the last of 8 bits.
        assert ((got.float() - want).abs() <= want.abs() * 2**-7).all()


# Each size in one of the formats, the first two in both.
@pytest.mark.parametrize(
    ("rows", "columns", "name"),
    [(*SIZES[0], "nvfp4"), (*SIZES[1], "mxfp8")]
    + [(*size, ("mxfp8", "nvfp4")[index % 2]) for index, size in enumerate(SIZES)],
)
def test_weights(rows: int, columns: int, name: str):
    first, second = (cases.block_scaled(rows, columns)[name] for _ in range(2))
    assert quant.unpack(first, torch.float32).isfinite().all()
    if second.zero is not None:
        second = second._replace(zero=torch.tensor([-2.5]))
    assert_is_the_definition([first, second])


def test_every_8_bit_float_and_power_of_2():
    """2^-9 times 2^-127, 448 times 2^127, and what is no number, on either side."""
    values = torch.arange(256, dtype=torch.uint8).view(8, 32).repeat(32, 1).view(torch.float8_e4m3fn)
    scale = torch.zeros(256, 4, dtype=torch.uint8)
    scale[:, 0] = torch.arange(256)
    packed = Packed(mxfp8, values, cases.blocked(scale))
    want = values.double() * 2.0 ** (torch.arange(256).double() - 127)[:, None]
    want[255] = float("nan")
    got = linear_launch.unpack([packed], torch.float32)[0]
    assert same(got, want.float()) and same(got, quant.unpack(packed, torch.float32))
    assert (got[0] > 0).sum() == 31, "no product with 2^-127 is too small"


def test_every_nibble_under_every_scale():
    """High bits first, with negative scales, and both that are no number."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(32, 8).repeat(8, 1)
    scale = torch.zeros(256, 4, dtype=torch.uint8)
    scale[:, 0] = codes
    for factor in (1.0, 1 / 2688, 3e-30):
        packed = Packed(nvfp4, values, cases.blocked(scale).view(torch.float8_e4m3fn), torch.tensor(factor))
        assert_nibbles(packed, codes)


def assert_nibbles(packed: Packed, codes: Tensor) -> None:
    got = linear_launch.unpack([packed], torch.float32)[0]
    assert same(got, quant.unpack(packed, torch.float32))
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([table, -table])
    high, low = numbers[packed.values.int() >> 4], numbers[packed.values.int() & 15]
    factors = codes.view(torch.float8_e4m3fn).float() * packed.zero
    assert same(got, torch.stack([high, low], dim=-1).flatten(-2) * factors[:, None])


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize(("rows", "columns"), [(33, 96), (128, 512)])
def test_the_results_alone_are_written(rows: int, columns: int, name: str, fences):
    packed = cases.block_scaled(rows, columns)[name]
    fenced = Packed(packed.form, *(None if x is None else fences.around(x) for x in packed[1:]))
    for got in linear_launch.unpack([fenced, fenced], torch.float32):
        assert same(got, quant.unpack(packed, torch.float32))
    for now, was in zip(fenced[1:], packed[1:], strict=True):
        assert was is None or torch.equal(now.view(-1).view(torch.uint8), was.view(-1).view(torch.uint8))
    fences.assert_intact()
