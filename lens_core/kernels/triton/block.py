"""The denoiser's work between its matrix products: each number is read once and written once.

Every kernel takes the image and the text stream in one launch (the first programs are the image's): on
their own, the few text rows would leave most of the GPU idle. Sizes that change from picture to picture are
not specialised, so that nothing is compiled again for them; their divisibility stands in constants instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantize import store_quantized


@triton.jit
def _modulated_rows(
    x, update, total, normed, scales, before, weight, after, row, tokens, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, SHIFT: tl.constexpr,
    ADD: tl.constexpr, NORM: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Rows ``row`` [R, 1] of one stream of one picture."""
    dtype: tl.constexpr = x.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < H
    ok = inside & (row < tokens)
    at = row * H + column
    value = tl.load(x + at, mask=ok, other=0).to(tl.float32)
    if ADD:
        gate = tl.load(before + GATE * H + column, mask=inside, other=0).to(tl.float32)
        value += gate * tl.load(update + at, mask=ok, other=0).to(tl.float32)
        rounded = value.to(dtype)
        tl.store(total + at, rounded, mask=ok)
        value = rounded.to(tl.float32)  # as the next block will read it
    if NORM:
        factor = 1 + tl.load(after + (SHIFT + 1) * H + column, mask=inside, other=0).to(tl.float32)
        factor *= tl.load(weight + column, mask=inside, other=0).to(tl.float32)
        shift = tl.load(after + SHIFT * H + column, mask=inside, other=0).to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value, 1) / H + eps)[:, None]
        if QUANTIZE:
            store_quantized(value * factor + shift, normed, scales, at, row, ok, row < tokens)
        else:
            tl.store(normed + at, (value * factor + shift).to(dtype), mask=ok)


@triton.jit(
    do_not_specialize=[
        "img_tokens", "img_before_stride", "img_after_stride",
        "txt_tokens", "txt_before_stride", "txt_after_stride",
    ]
)  # fmt: skip
def add_modulate(
    img, img_update, img_total, img_normed, img_scales, img_before, img_weight, img_after,
    img_tokens, img_before_stride, img_after_stride, img_eps,
    txt, txt_update, txt_total, txt_normed, txt_scales, txt_before, txt_weight, txt_after,
    txt_tokens, txt_before_stride, txt_after_stride, txt_eps,
    H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr, SHIFT: tl.constexpr,
    ADD: tl.constexpr, NORM: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Streams [B, T, H]; their tables [B, 6 H] have one row a picture, at strides counted in H.

    With QUANTIZE the normed rows are stored in 8 bits, and fp32 ``scales`` [B, T] with them.
    """
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    image_programs = tl.cdiv(img_tokens, ROWS)
    lane = tl.arange(0, ROWS)[:, None]
    if program < image_programs:
        base = batch * img_tokens * H
        _modulated_rows(
            img + base, img_update + base, img_total + base, img_normed + base,
            img_scales + batch * img_tokens,
            img_before + batch * img_before_stride * H, img_weight, img_after + batch * img_after_stride * H,
            program * ROWS + lane, img_tokens, img_eps,
            H, BLOCK, GATE, SHIFT, ADD, NORM, QUANTIZE,
        )  # fmt: skip
    else:
        base = batch * txt_tokens * H
        _modulated_rows(
            txt + base, txt_update + base, txt_total + base, txt_normed + base,
            txt_scales + batch * txt_tokens,
            txt_before + batch * txt_before_stride * H, txt_weight, txt_after + batch * txt_after_stride * H,
            (program - image_programs) * ROWS + lane, txt_tokens, txt_eps,
            H, BLOCK, GATE, SHIFT, ADD, NORM, QUANTIZE,
        )  # fmt: skip


@triton.jit
def _head_rows(
    source, target, token_stride, weight, factor, rotary, half, token, joint, tokens, eps, part,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One of q, k and v of some tokens [R, 1, 1] of one stream of one picture."""
    ok = token < tokens
    channel = tl.arange(0, D)[None, None, :]
    pair = tl.arange(0, D // 2)[None, None, :]
    cos = tl.load(rotary + joint * (D // 2) + pair, mask=ok, other=0)
    sin = tl.load(rotary + half + joint * (D // 2) + pair, mask=ok, other=0)
    gain = tl.load(weight + channel).to(tl.float32) * factor
    for first in tl.static_range(0, HEADS, GROUP):
        head = first + tl.arange(0, GROUP)[None, :, None]
        value = tl.load(source + ((token * 3 + part) * HEADS + head) * D + channel, mask=ok, other=0)
        if part < 2:
            x = value.to(tl.float32)
            x = x * tl.rsqrt(tl.sum(x * x, 2) / D + eps)[:, :, None] * gain
            real, imaginary = tl.split(tl.reshape(x, (x.shape[0], GROUP, D // 2, 2)))
            turned = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
            value = tl.reshape(turned, (x.shape[0], GROUP, D)).to(value.dtype)
        tl.store(target + (token * token_stride * HEADS + head) * D + channel, value, mask=ok)


@triton.jit(do_not_specialize=["img_tokens", "txt_tokens", "part_stride", "img_stride", "txt_stride"])
def turn_heads(
    img, txt, img_out, txt_out, rotary, img_q, img_k, img_eps, txt_q, txt_k, txt_eps, q_factor,
    img_tokens, txt_tokens, part_stride, img_stride, txt_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
):  # fmt: skip
    """img and txt [B, T, 3, HEADS, D] -> q (times ``q_factor``) and k, normed and rotated, and v as it is.

    rotary [2, N + S, D / 2]. The strides of what is written, from part to part, picture to picture and token
    to token, count rows of HEADS * D. Each number is read by the program that writes it, so the outputs may
    be the inputs.
    """
    program = tl.program_id(0)
    part = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    WIDTH: tl.constexpr = HEADS * D
    half = (img_tokens + txt_tokens) * (D // 2)
    image_programs = tl.cdiv(img_tokens, ROWS)
    lane = tl.arange(0, ROWS)[:, None, None]
    factor = q_factor
    if part == 1:
        factor = 1.0
    if program < image_programs:
        weight = img_q
        if part == 1:
            weight = img_k
        token = program * ROWS + lane
        _head_rows(
            img + batch * img_tokens * (3 * WIDTH),
            img_out + (part.to(tl.int64) * part_stride + batch * img_stride) * WIDTH,
            TOKEN_STRIDE, weight, factor, rotary, half, token, token, img_tokens, img_eps, part,
            HEADS, GROUP, D,
        )  # fmt: skip
    else:
        weight = txt_q
        if part == 1:
            weight = txt_k
        token = (program - image_programs) * ROWS + lane
        _head_rows(
            txt + batch * txt_tokens * (3 * WIDTH),
            txt_out + (part.to(tl.int64) * part_stride + batch * txt_stride) * WIDTH,
            TOKEN_STRIDE, weight, factor, rotary, half, token, img_tokens + token, txt_tokens, txt_eps, part,
            HEADS, GROUP, D,
        )  # fmt: skip


@triton.jit
def _gated(gate, up, at, ok):
    """silu(gate) * up in place of the gate."""
    g = tl.load(gate + at, mask=ok, other=0).to(tl.float32)
    u = tl.load(up + at, mask=ok, other=0).to(tl.float32)
    tl.store(gate + at, (g * tl.sigmoid(g) * u).to(gate.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["img_rows", "txt_rows"])
def swiglu(img, img_up, txt, txt_up, img_rows, txt_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) * up in place of each stream's gate, over its rows of WIDTH numbers."""
    program = tl.program_id(0).to(tl.int64)
    image = img_rows.to(tl.int64) * WIDTH
    image_programs = tl.cdiv(image, BLOCK)
    lane = tl.arange(0, BLOCK)
    if program < image_programs:
        at = program * BLOCK + lane
        _gated(img, img_up, at, at < image)
    else:
        at = (program - image_programs) * BLOCK + lane
        _gated(txt, txt_up, at, at < txt_rows.to(tl.int64) * WIDTH)


@triton.jit
def _gated_rows(gate, up, values, scales, row, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``row`` [R, 1] of one stream."""
    column = tl.arange(0, BLOCK)[None, :]
    ok = (row < rows) & (column < WIDTH)
    at = row * WIDTH + column
    g = tl.load(gate + at, mask=ok, other=0).to(tl.float32)
    u = tl.load(up + at, mask=ok, other=0).to(tl.float32)
    store_quantized(g * tl.sigmoid(g) * u, values, scales, at, row, ok, row < rows)


@triton.jit(do_not_specialize=["img_rows", "txt_rows"])
def swiglu_quantized(
    img, img_up, img_values, img_scales, txt, txt_up, txt_values, txt_scales, img_rows, txt_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of each stream in 8 bits, with fp32 scales; a program sees whole rows."""
    program = tl.program_id(0).to(tl.int64)
    image_programs = tl.cdiv(img_rows, ROWS)
    lane = tl.arange(0, ROWS)[:, None]
    if program < image_programs:
        row = program * ROWS + lane
        _gated_rows(img, img_up, img_values, img_scales, row, img_rows, WIDTH, BLOCK)
    else:
        row = (program - image_programs) * ROWS + lane
        _gated_rows(txt, txt_up, txt_values, txt_scales, row, txt_rows, WIDTH, BLOCK)
