"""MXFP4: every byte and scale against a literal loop and transformers; quantising and its error."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lens_core.quant.mxfp4 import dequantize, quantize

# OCP Microscaling Formats 1.0, table of e2m1.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def literal(blocks: Tensor, scales: Tensor) -> Tensor:
    """Byte by byte: the low nibble first, sign in bit 3 of a nibble, scale 2^(byte - 127)."""
    rows = []
    for row, exponents in zip(blocks.tolist(), scales.tolist(), strict=True):
        values = []
        for group, exponent in zip(row, exponents, strict=True):
            for byte in group:
                for code in (byte & 15, byte >> 4):
                    sign = -1.0 if code & 8 else 1.0
                    values.append(sign * MAGNITUDES[code & 7] * 2.0 ** (exponent - 127))
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


def random_packed(rows: int, groups: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    blocks = torch.randint(0, 256, (rows, groups, 16), dtype=torch.uint8)
    return blocks, torch.randint(low, high + 1, (rows, groups), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantize_equals_the_literal_loop(dtype: torch.dtype):
    blocks, scales = random_packed(7, 3, 90, 140)
    # Exact: a value has two significant bits and the scale is a power of two.
    assert torch.equal(dequantize(blocks, scales, dtype).double(), literal(blocks, scales))


def test_every_byte_value_is_decoded():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    scales = torch.full((1, 16), 127, dtype=torch.uint8)
    assert torch.equal(dequantize(blocks, scales, torch.float32).double(), literal(blocks, scales))


def test_values_run_low_nibble_first_along_the_input():
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0], blocks[0, 0, 15] = 0x21, 0xF0
    got = dequantize(blocks, torch.tensor([[128]], dtype=torch.uint8), torch.float32)
    assert got.shape == (1, 32)
    assert got[0, :2].tolist() == [1.0, 2.0]
    assert got[0, 30:].tolist() == [0.0, -12.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantize_equals_transformers_for_every_scale(dtype: torch.dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # Experts [E, rows, groups, 16]: row r of the only expert has scale byte r + 1, from 1 to 254.
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 254, 1, 1)
    scales = torch.arange(1, 255, dtype=torch.uint8).view(1, 254, 1).repeat(1, 1, 16)
    want = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)  # theirs is [E, in, out]
    got = dequantize(blocks, scales, dtype)
    assert got.shape == (1, 254, 512)
    assert torch.equal(got, want)
    assert torch.equal(got.signbit(), want.signbit())  # negative zeros too


def test_dequantize_keeps_the_packed_bytes():
    blocks, scales = random_packed(2, 2, 100, 130)
    before = blocks.clone(), scales.clone()
    first = dequantize(blocks, scales, torch.float32)
    assert torch.equal(dequantize(blocks, scales, torch.float32), first)
    assert torch.equal(blocks, before[0])
    assert torch.equal(scales, before[1])


def test_quantize_has_the_checkpoints_shapes():
    blocks, scales = quantize(torch.randn(5, 7, 96))
    assert (blocks.shape, blocks.dtype) == ((5, 7, 3, 16), torch.uint8)
    assert (scales.shape, scales.dtype) == ((5, 7, 3), torch.uint8)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_quantize_of_a_dequantized_weight_changes_nothing(size: float):
    once = dequantize(*quantize(size * torch.randn(64, 128)), torch.float32)
    assert torch.equal(dequantize(*quantize(once), torch.float32), once)


def test_quantize_finds_the_nearest_value_but_for_saturation():
    weight = torch.randn(64, 128)
    blocks, scales = quantize(weight)
    got = dequantize(blocks, scales, torch.float32)
    unit = torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    ratio, error = (weight / unit).abs(), (got - weight).abs() / unit
    # Half the widest gap is 1 (between 4 and 6); from 6 to 8 everything becomes 6, at most 2 off.
    assert error.max() <= 2
    assert error[ratio <= 6].max() <= 1
    assert error[ratio <= 2].max() <= 0.25
    assert (ratio.unflatten(-1, (-1, 32)).amax(-1) >= 4).all()
    assert ratio.max() < 8


def test_quantize_of_zeros_is_zeros():
    assert torch.equal(dequantize(*quantize(torch.zeros(2, 64)), torch.float32), torch.zeros(2, 64))


def test_quantize_keeps_a_power_of_two_exact():
    weight = torch.tensor([2.0**-30, 0.25, 1.0, -8.0]).repeat_interleave(32)[None]
    assert torch.equal(dequantize(*quantize(weight), torch.float32), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [7, 100, 127, 200, 252])
def test_quantize_gives_back_every_block_that_was_mxfp4(scale: int, dtype: torch.dtype):
    """Blocks of every largest code, among them those that get a smaller scale: no value changes."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (1, 800, 2, 16), dtype=torch.uint8)
    for largest in range(8):  # 100 rows each: magnitudes up to this code, and at least one of it
        part = blocks[0, 100 * largest : 100 * (largest + 1)]
        codes = torch.stack([part & 15, part >> 4], -1)
        codes = (codes & 8) | (codes & 7) % (largest + 1)
        codes[..., 0, 0] = largest
        part.copy_(codes[..., 0] | codes[..., 1] << 4)
    scales = torch.full((1, 800, 2), scale, dtype=torch.uint8)
    want = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=dtype).transpose(1, 2)
    again, rescaled = quantize(want)
    got = dequantize(again, rescaled, dtype)
    assert torch.equal(got, want)
    assert torch.equal(got.signbit(), want.signbit())
    # Where the largest magnitude is 4 or 6 the rule chooses the same exponent, so the bytes are the same.
    kept = slice(600, 800)
    assert torch.equal(again[:, kept], blocks[:, kept])
    assert torch.equal(rescaled[:, kept], scales[:, kept])


def test_fp16_holds_the_scales_that_weights_have():
    """fp16 files of MXFP4 weights are exact from 2^-14 to 2^2, GPT-OSS's range as far as is known."""
    blocks, scales = random_packed(64, 8, 113, 129)
    half = dequantize(blocks, scales, torch.float16)
    assert torch.equal(half.float(), dequantize(blocks, scales, torch.float32))
    assert torch.equal(dequantize(*quantize(half), torch.float16), half)


def test_a_value_between_two_becomes_the_smaller_one():
    between = [(a + b) / 2 for a, b in pairwise(MAGNITUDES)]
    weight = torch.tensor([*between, *(-value for value in between), 4.0]).repeat(3)[:32]
    weight[31] = 4.0
    got = dequantize(*quantize(weight), torch.float32)
    lower = [*MAGNITUDES[:-1], *(-m for m in MAGNITUDES[:-1]), 4.0]
    want = torch.tensor(lower).repeat(3)[:32]
    want[31] = 4.0
    assert torch.equal(got, want)


def test_the_exponent_is_exact_just_below_a_power_of_two():
    weight = torch.full((1, 32), 8.0).nextafter(torch.tensor(0.0))
    assert quantize(weight)[1].item() == 127
    assert quantize(torch.full((1, 32), 8.0))[1].item() == 128


def test_bytes_at_an_odd_place_are_unpacked_too():
    raw = torch.randint(0, 256, (1 + 4 * 16,), dtype=torch.uint8)
    blocks = raw[1:].view(1, 4, 16)
    assert blocks.storage_offset() == 1
    scales = torch.full((1, 4), 120, dtype=torch.uint8)
    assert torch.equal(dequantize(blocks, scales, torch.float32).double(), literal(blocks, scales))
