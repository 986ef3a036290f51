"""mxfp8 and nvfp4 unpacked: ``lens_core.quant.block_scales`` has their definition.

As in ``linear``, the image's and the text's layer are one launch, and a layer's sizes are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear import float8


@triton.jit
def _float4(byte):
    """u8 [C, W / 2] of two float4_e2m1 each -> fp32 [C, W], the first of two in the high bits. By those:
    shifted to fp16's place they are 2^-14 of the number."""
    nibble = tl.join(byte >> 4, byte & 15).to(tl.uint16)
    bits = ((nibble & 8) << 12) | ((nibble & 7) << 9)
    number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384
    return tl.reshape(number, (byte.shape[0], 2 * byte.shape[1]))


@triton.jit
def _power_of_2(byte):
    """2^(byte - 127) in fp32, by its bits: 2^-127 is a subnormal one, and 255 is no number."""
    bits = tl.where(byte == 0, 1 << 22, byte.to(tl.int32) << 23)
    return tl.where(byte == 255, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _at_scale(row, group, C: tl.constexpr):
    """Where the scale of a row and a group lies among rows of C groups, in tiles of 128 rows and 4 groups."""
    tile = (row // 128) * (C // 4) + group // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + group % 4


@triton.jit
def _unpacked(
    values, scale, factor, out, program, rows,
    K: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, FLOAT4: tl.constexpr,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """CHUNKS pieces of WIDTH numbers each of one weight. Of four, each is 32 rows below the one before it:
    their scales lie side by side."""
    groups: tl.constexpr = WIDTH // GROUP
    index = program * CHUNKS + tl.arange(0, CHUNKS)
    place = index // 4
    line, piece = place // (K // WIDTH), place % (K // WIDTH)
    row = line // 32 * 128 + index % 4 * 32 + line % 32
    ok = row < rows
    # Groups first: each scale is read once, and not for each of its numbers.
    group = piece[:, None] * groups + tl.arange(0, groups)[None, :]
    byte = tl.load(scale + _at_scale(row[:, None], group, C), mask=ok[:, None], other=0)
    factors = float8(byte, 3) * tl.load(factor) if FLOAT4 else _power_of_2(byte)
    chunk = (row * (K // WIDTH) + piece)[:, None]
    if FLOAT4:
        at = chunk * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
        number = _float4(tl.load(values + at, mask=ok[:, None], other=0))
    else:
        at = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
        number = float8(tl.load(values + at, mask=ok[:, None], other=0), 3)
    number = tl.reshape(number, (CHUNKS, groups, GROUP)) * factors[:, :, None]
    number = tl.reshape(number, (CHUNKS, WIDTH)).to(out.dtype.element_ty)
    tl.store(out + chunk * WIDTH + tl.arange(0, WIDTH)[None, :], number, mask=ok[:, None])


@triton.jit(do_not_specialize=["rows"])
def unpack(
    img, img_scale, img_factor, img_out, txt, txt_scale, txt_factor, txt_out, rows,
    K: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, FLOAT4: tl.constexpr,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """u8 weights [rows, K] or, with FLOAT4, [rows, K / 2], their scales u8 [R, C], one for each GROUP."""
    program = tl.program_id(0)
    if tl.program_id(1) == 0:
        _unpacked(img, img_scale, img_factor, img_out, program, rows, K, C, GROUP, FLOAT4, WIDTH, CHUNKS)
    else:
        _unpacked(txt, txt_scale, txt_factor, txt_out, program, rows, K, C, GROUP, FLOAT4, WIDTH, CHUNKS)
