"""Quantised weights unpacked, and products of 8-bit numbers.

Each kernel takes the image's and the text's layer in one launch (the first programs are the image's). The
number of tokens is not specialised, so that nothing is compiled again for another picture; a layer's sizes
are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float8(byte, MANTISSA: tl.constexpr):
    """A u8 that holds a float8_e4m3fn (MANTISSA 3) or float8_e5m2 (2), in fp32. By its bits, since GPUs
    before 8.9 cannot convert them: shifted to fp16's place they are 2^-8 of an e4m3fn, and an e5m2 itself."""
    bits = byte.to(tl.uint16)
    if MANTISSA == 2:
        return (bits << 8).to(tl.float16, bitcast=True).to(tl.float32)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), number)


@triton.jit
def _nibbles(byte, SIGNED: tl.constexpr):
    """u8 [C, G / 2] -> fp32 [C, G], the first of two in the low bits."""
    numbers = tl.join(byte & 15, byte >> 4).to(tl.int32)
    if SIGNED:
        numbers = (numbers ^ 8) - 8
    return tl.reshape(numbers.to(tl.float32), (byte.shape[0], 2 * byte.shape[1]))


@triton.jit
def _unpacked(
    values, scale, zero, out, program, chunks,
    WIDTH: tl.constexpr, PER: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, ZERO: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Some chunks of one weight."""
    index = program * CHUNKS + tl.arange(0, CHUNKS)
    chunk = index[:, None]
    ok = chunk < chunks
    if BITS == 4:
        byte = tl.load(values + chunk * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :], mask=ok, other=0)
        number = _nibbles(byte, not ZERO)
    else:
        byte = tl.load(values + chunk * WIDTH + tl.arange(0, WIDTH)[None, :], mask=ok, other=0)
        number = byte.to(tl.float32) if MANTISSA == 0 else float8(byte, MANTISSA)
    # By ``index``: each number of a column [CHUNKS, 1] would be read many times.
    if PER == 0:
        number *= tl.load(scale).to(tl.float32)
        if ZERO:
            number += tl.load(zero).to(tl.float32)
    else:
        number *= tl.load(scale + index // PER, mask=index < chunks, other=0).to(tl.float32)[:, None]
        if ZERO:
            number += tl.load(zero + index // PER, mask=index < chunks, other=0).to(tl.float32)[:, None]
    at = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out + at, number.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["chunks"])
def unpack(
    img, img_scale, img_zero, img_out, txt, txt_scale, txt_zero, txt_out, chunks,
    WIDTH: tl.constexpr, PER: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, ZERO: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Weights of ``chunks`` of WIDTH numbers each, of which PER (0: all) share a scale and, with ZERO, a zero
    point. Their integers are signed where there is none, or floats of MANTISSA bits (0: they are not)."""
    program = tl.program_id(0)
    if tl.program_id(1) == 0:
        _unpacked(
            img, img_scale, img_zero, img_out, program, chunks, WIDTH, PER, BITS, MANTISSA, ZERO, CHUNKS
        )
    else:
        _unpacked(
            txt, txt_scale, txt_zero, txt_out, program, chunks, WIDTH, PER, BITS, MANTISSA, ZERO, CHUNKS
        )


@triton.jit
def _tile(index, rows, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile: down GROUP rows, then to the next column, so that tiles at work at the same
    time share what they read."""
    first = index // (GROUP * COLUMNS) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = index % (GROUP * COLUMNS)
    return first + within % height, within // height


@triton.jit
def _scaled(
    total, row_scale, column_scale, bias, row, column, M,
    N: tl.constexpr, ONE_SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Sums [BM, BN] times their scales, and the bias added, in fp32."""
    inside = column < N
    out = total.to(tl.float32) * tl.load(row_scale + row, mask=row < M, other=0)[:, None]
    if ONE_SCALE:
        out *= tl.load(column_scale)
    else:
        out *= tl.load(column_scale + column, mask=inside, other=0)[None, :]
    if BIAS:
        out += tl.load(bias + column, mask=inside, other=0).to(tl.float32)[None, :]
    return out


@triton.jit
def _product(
    x, weight, out, row_scale, column_scale, bias, index, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, ONE_SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One tile of one stream: 8-bit x [M, K] and weight [N, K] -> out [M, N]. Integers are summed exactly."""
    sums: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    tile_row, tile_column = _tile(index, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    row, column = tile_row * BM + tl.arange(0, BM), tile_column * BN + tl.arange(0, BN)
    lane = tl.arange(0, BK)
    # Beyond the edges the first rows are read again, and nothing is stored.
    x_at = x + tl.where(row < M, row, 0).to(tl.int64)[:, None] * K + lane[None, :]
    weight_at = weight + tl.where(column < N, column, 0)[None, :] * K + lane[:, None]
    total = tl.zeros((BM, BN), sums)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        if K % BK == 0:
            a, b = tl.load(x_at), tl.load(weight_at)
        else:
            # 0.0, since integers are not converted to 8-bit floats.
            a = tl.load(x_at, mask=(lane < K - k)[None, :], other=0.0)
            b = tl.load(weight_at, mask=(lane < K - k)[:, None], other=0.0)
        total = tl.dot(a, b, total, out_dtype=sums)
        x_at += BK
        weight_at += BK
    result = _scaled(total, row_scale, column_scale, bias, row, column, M, N, ONE_SCALE, BIAS)
    at = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def _either(img, txt, second):
    """The second of two pointers or the first; the compiler still knows that 16 bytes are a step of both."""
    apart = (txt.to(tl.int64) - img.to(tl.int64)) // 16
    return img + tl.where(second, apart, 0) * (128 // img.dtype.element_ty.primitive_bitwidth)


@triton.jit(do_not_specialize=["img_rows", "txt_rows"])
def multiply(
    img, img_weight, img_out, img_row_scale, img_column_scale, img_bias,
    txt, txt_weight, txt_out, txt_row_scale, txt_column_scale, txt_bias, img_rows, txt_rows,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, ONE_SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """8-bit streams [rows, K] and their weights [N, K] -> [rows, N]; one tile a program.

    The stream is chosen before the product: with one for each in the code, each would have its own shared
    memory, and one program fit on a multiprocessor instead of two.
    """
    index = tl.program_id(0)
    image_tiles = tl.cdiv(img_rows, BM) * tl.cdiv(N, BN)
    text = index >= image_tiles
    x, weight = _either(img, txt, text), _either(img_weight, txt_weight, text)
    out = _either(img_out, txt_out, text)
    row_scale, column_scale, bias, rows = img_row_scale, img_column_scale, img_bias, img_rows
    if text:
        row_scale, column_scale, bias, rows = txt_row_scale, txt_column_scale, txt_bias, txt_rows
        index -= image_tiles
    _product(
        x, weight, out, row_scale, column_scale, bias, index, rows,
        N, K, BM, BN, BK, GROUP, STAGES, ONE_SCALE, BIAS,
    )  # fmt: skip
