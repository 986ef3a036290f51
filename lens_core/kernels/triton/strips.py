"""The VAE decoder's work between its convolutions: each number of a strip is read once and written once.

Strips have their channels together, [n, width, C] in memory, so a kernel sees pixels in a row, [pixels, C].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _summed(x, bias, residual, at, ok, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    """x + bias + residual in place and, as it was rounded there, in fp32."""
    value = tl.load(x + at, mask=ok, other=0)
    if BIAS or RESIDUAL:
        total = value.to(tl.float32)
        if BIAS:
            total += bias
        if RESIDUAL:
            total += tl.load(residual + at, mask=ok, other=0).to(tl.float32)
        value = total.to(x.dtype.element_ty)
        tl.store(x + at, value, mask=ok)
    return value.to(tl.float32)


@triton.jit(do_not_specialize=["pixels", "share"])
def add_moments(
    x, bias, residual, moments, pixels, share,
    C: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """x [pixels, C] += bias [C] + residual [pixels, C], and moments [P, 3, C] of a program's share of pixels.

    The squares are summed as distances from the mean of the first PIXELS, so that little cancels. Nothing is
    added across programs: every run gives the same bits.
    """
    program = tl.program_id(0)
    start = program.to(tl.int64) * share
    count = tl.minimum(pixels - start, share).to(tl.int32)
    x += start * C
    residual += start * C
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    lane = tl.arange(0, PIXELS)[:, None]
    at = lane * C + channel[None, :]
    offset = tl.zeros([1, BLOCK], tl.float32)
    if BIAS:
        offset = tl.load(bias + channel, mask=inside, other=0).to(tl.float32)[None, :]

    ok = inside[None, :] & (lane < count)
    value = _summed(x, offset, residual, at, ok, BIAS, RESIDUAL)
    first = tl.minimum(count, PIXELS).to(tl.float32)
    reference = tl.sum(tl.where(ok, value, 0.0), 0) / first
    distance = tl.where(ok, value - reference[None, :], 0.0)
    sums = distance
    squares = distance * distance
    done = PIXELS
    while done < count:
        ok = inside[None, :] & (done + lane < count)
        value = _summed(x, offset, residual, done * C + at, ok, BIAS, RESIDUAL)
        distance = tl.where(ok, value - reference[None, :], 0.0)
        sums += distance
        squares += distance * distance
        done += PIXELS
    number = count.to(tl.float32)
    away = tl.sum(sums, 0) / number
    out = moments + program * (3 * C) + channel
    tl.store(out, tl.zeros([BLOCK], tl.float32) + number, mask=inside)
    tl.store(out + C, reference + away, mask=inside)
    tl.store(out + 2 * C, tl.maximum(tl.sum(squares, 0) - number * away * away, 0.0), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def affine(
    moments, weight, bias, scale, shift, parts, eps,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A group of GROUP channels: its norm's scale and shift [C] from moments [parts, 3, C]."""
    column = tl.arange(0, BLOCK)
    inside = column < GROUP
    channel = tl.program_id(0) * GROUP + column
    lane = tl.arange(0, PARTS)[:, None]
    reference = tl.load(moments + C + tl.program_id(0) * GROUP)
    counts = tl.zeros([PARTS, BLOCK], tl.float32)
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    first = 0
    while first < parts:
        ok = inside[None, :] & (first + lane < parts)
        at = (first + lane) * (3 * C) + channel[None, :]
        count = tl.load(moments + at, mask=ok, other=0)
        counts += count
        sums += count * (tl.load(moments + at + C, mask=ok, other=0) - reference)
        first += PARTS
    number = tl.sum(tl.sum(counts, 0), 0)
    distance = tl.sum(tl.sum(sums, 0), 0) / number
    squares = tl.zeros([PARTS, BLOCK], tl.float32)
    first = 0
    while first < parts:
        ok = inside[None, :] & (first + lane < parts)
        at = (first + lane) * (3 * C) + channel[None, :]
        count = tl.load(moments + at, mask=ok, other=0)
        away = tl.load(moments + at + C, mask=ok, other=0) - reference - distance
        squares += tl.load(moments + at + 2 * C, mask=ok, other=0) + count * away * away
        first += PARTS
    variance = tl.sum(tl.sum(squares, 0), 0) / number
    gain = tl.load(weight + channel, mask=inside, other=0).to(tl.float32) * tl.rsqrt(variance + eps)
    tl.store(scale + channel, gain, mask=inside)
    offset = tl.load(bias + channel, mask=inside, other=0).to(tl.float32) - gain * (reference + distance)
    tl.store(shift + channel, offset, mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def normalise_silu(
    window, piece, scale, shift, pixels, C: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr
):
    """silu(piece * scale + shift) of [pixels, C] into the window; scale and shift [C]."""
    dtype: tl.constexpr = window.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * PIXELS
    lane = tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = channel < C
    ok = inside & (lane < pixels - start)
    at = lane * C + channel
    gain = tl.load(scale + channel, mask=inside, other=0)
    offset = tl.load(shift + channel, mask=inside, other=0)
    value = tl.load(piece + start * C + at, mask=ok, other=0).to(tl.float32) * gain + offset
    value = value.to(dtype).to(tl.float32)  # the norm is rounded, too
    tl.store(window + start * C + at, (value * tl.sigmoid(value)).to(dtype), mask=ok)


@triton.jit(do_not_specialize=["pixels", "width"])
def double(
    window, piece, pixels, width,
    C: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each of ``pixels`` of [n, width, C] twice in its row of [n ROWS, 2 width, C], and in ROWS rows."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    ok = (channel < C) & (pixel < pixels)
    value = tl.load(piece + pixel.to(tl.int64) * C + channel, mask=ok, other=0)
    target = 2 * pixel + (ROWS - 1) * 2 * width * (pixel // width)
    for below in tl.static_range(ROWS):
        for beside in tl.static_range(2):
            at = (target + below * 2 * width + beside).to(tl.int64) * C + channel
            tl.store(window + at, value, mask=ok)
