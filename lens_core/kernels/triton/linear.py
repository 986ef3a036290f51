"""Quantised weights unpacked, and products of 8-bit integers.

The number of tokens is not specialised, so that nothing is compiled again for another picture; a layer's
sizes are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .experts import INTERPRETED


@triton.jit
def _float8(byte, MANTISSA: tl.constexpr):
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
def unpack(
    values, scale, zero, out, chunks,
    WIDTH: tl.constexpr, PER: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, ZERO: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """A weight as ``chunks`` of WIDTH numbers, of which PER (0: all) share a scale and, with ZERO, a zero
    point. Their integers are signed where there is none, or floats of MANTISSA bits (0: they are not)."""
    index = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    chunk = index[:, None]
    ok = chunk < chunks
    if BITS == 4:
        byte = tl.load(values + chunk * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :], mask=ok, other=0)
        number = _nibbles(byte, not ZERO)
    else:
        byte = tl.load(values + chunk * WIDTH + tl.arange(0, WIDTH)[None, :], mask=ok, other=0)
        number = byte.to(tl.float32) if MANTISSA == 0 else _float8(byte, MANTISSA)
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
    """Sums [BM, BN] in int32 times their scales, and the bias added, in fp32."""
    inside = column < N
    out = total.to(tl.float32) * tl.load(row_scale + row, mask=row < M, other=0)[:, None]
    if ONE_SCALE:
        out *= tl.load(column_scale)
    else:
        out *= tl.load(column_scale + column, mask=inside, other=0)[None, :]
    if BIAS:
        out += tl.load(bias + column, mask=inside, other=0).to(tl.float32)[None, :]
    return out


@triton.jit(do_not_specialize=["M"])
def multiply(
    x, weight, out, row_scale, column_scale, bias, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, ONE_SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """int8 x [M, K] and weight [N, K] -> out [M, N]; one tile a program."""
    tile_row, tile_column = _tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    row, column = tile_row * BM + tl.arange(0, BM), tile_column * BN + tl.arange(0, BN)
    lane = tl.arange(0, BK)
    # Beyond the edges the first rows are read again, and nothing is stored.
    x_at = x + tl.where(row < M, row, 0).to(tl.int64)[:, None] * K + lane[None, :]
    weight_at = weight + tl.where(column < N, column, 0)[None, :] * K + lane[:, None]
    total = tl.zeros((BM, BN), tl.int32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        if K % BK == 0:
            a, b = tl.load(x_at), tl.load(weight_at)
        else:
            a = tl.load(x_at, mask=(lane < K - k)[None, :], other=0)
            b = tl.load(weight_at, mask=(lane < K - k)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        x_at += BK
        weight_at += BK
    result = _scaled(total, row_scale, column_scale, bias, row, column, M, N, ONE_SCALE, BIAS)
    at = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def _described_tile(
    x, weight, out, row_scale, column_scale, bias, M, index,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, ONE_SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    tile_row, tile_column = _tile(index, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    total = tl.zeros((BM, BN), tl.int32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        a, b = x.load([tile_row * BM, k]), weight.load([tile_column * BN, k])
        total = tl.dot(a, b.T, total, out_dtype=tl.int32)
    row, column = tile_row * BM + tl.arange(0, BM), tile_column * BN + tl.arange(0, BN)
    result = _scaled(total, row_scale, column_scale, bias, row, column, M, N, ONE_SCALE, BIAS)
    out.store([tile_row * BM, tile_column * BN], result.to(out.dtype))


@triton.jit(do_not_specialize=["M"])
def multiply_hopper(
    x, weight, out, row_scale, column_scale, bias, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, ONE_SCALE: tl.constexpr, BIAS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors, which read zeros beyond the edges and store nothing there.

    PROGRAMS take tiles in turn, and load one's first numbers while the one before is stored.
    """
    first = tl.program_id(0)
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    if INTERPRETED:  # it has no ranges over what is only known at run time
        while first < tiles:
            _described_tile(
                x, weight, out, row_scale, column_scale, bias, M, first,
                N, K, BM, BN, BK, GROUP, STAGES, ONE_SCALE, BIAS,
            )  # fmt: skip
            first += PROGRAMS
    else:
        for index in tl.range(first, tiles, PROGRAMS, flatten=True):
            _described_tile(
                x, weight, out, row_scale, column_scale, bias, M, index,
                N, K, BM, BN, BK, GROUP, STAGES, ONE_SCALE, BIAS,
            )  # fmt: skip
