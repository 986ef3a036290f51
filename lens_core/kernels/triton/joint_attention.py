"""Attention over image and text where they lie, without the running maximum that others need.

Queries and keys come out of an RMSNorm, so a score cannot exceed |q| |k|, known before the first key is seen.
A softmax may subtract any number from a row's scores; subtracting one that depends on that bound alone leaves
an exponential, a sum and two matrix products: on an H200 three quarters of cuDNN's time at Lens' sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .experts import INTERPRETED, multiply


@triton.jit
def _step(acc, total, q, shift, k, v, ok, MASKED: tl.constexpr):
    """One tile of keys: total [M, 8] are partial sums, so that no lane waits for another."""
    M: tl.constexpr = q.shape[0]
    N: tl.constexpr = v.shape[0]
    scores = multiply(q, k, tl.zeros((M, N), tl.float32))
    weights = tl.exp2(scores - shift[:, None])
    if MASKED:
        weights = tl.where(ok[None, :], weights, 0.0)
    total += tl.sum(tl.reshape(weights, (M, N // 8, 8)), 1)
    return multiply(weights.to(v.dtype), v, acc), total


@triton.jit
def _over_keys(
    acc, total, q, shift, qkv, count,
    N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All keys of one stream of one head: keys at ``qkv`` + WIDTH, values at + 2 WIDTH."""
    lane = tl.arange(0, N)
    channel = tl.arange(0, D)
    keys = qkv + WIDTH + lane[None, :] * (3 * WIDTH) + channel[:, None]
    values = qkv + 2 * WIDTH + lane[:, None] * (3 * WIDTH) + channel[None, :]
    whole = count // N * N
    ok = whole + lane < count
    if INTERPRETED:  # it has no ranges over what is only known at run time
        done = 0
        while done < whole:
            acc, total = _step(acc, total, q, shift, tl.load(keys), tl.load(values), ok, False)
            keys += N * 3 * WIDTH
            values += N * 3 * WIDTH
            done += N
    else:
        for _ in tl.range(0, whole, N, num_stages=STAGES):
            acc, total = _step(acc, total, q, shift, tl.load(keys), tl.load(values), ok, False)
            keys += N * 3 * WIDTH
            values += N * 3 * WIDTH
    if whole < count:
        k = tl.load(keys, mask=ok[None, :], other=0)
        v = tl.load(values, mask=ok[:, None], other=0)
        acc, total = _step(acc, total, q, shift, k, v, ok, True)
    return acc, total


@triton.jit(do_not_specialize=["img_tokens", "txt_tokens"])
def attend(
    img, txt, img_out, txt_out, img_gain, txt_gain, img_tokens, txt_tokens, headroom,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """img and txt [B, T, 3, HEADS, D], q scaled by log2(e) / sqrt(D) -> out [B, T, HEADS * D].

    Gains [D] are the key norms' weights: no key is longer than sqrt(D) times the largest, but for its
    rounding to bf16. exp2 gets scores up to ``headroom``.
    """
    WIDTH: tl.constexpr = HEADS * D
    dtype: tl.constexpr = img.dtype.element_ty
    program = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, D)
    img += batch * img_tokens * (3 * WIDTH) + head * D
    txt += batch * txt_tokens * (3 * WIDTH) + head * D
    image_programs = tl.cdiv(img_tokens, M)
    source = img
    target = img_out + batch * img_tokens * WIDTH + head * D
    first = program * M
    tokens = img_tokens
    if program >= image_programs:
        source = txt
        target = txt_out + batch * txt_tokens * WIDTH + head * D
        first = (program - image_programs) * M
        tokens = txt_tokens
    row = first + tl.arange(0, M)
    ok = row < tokens
    q = tl.load(source + row[:, None] * (3 * WIDTH) + channel[None, :], mask=ok[:, None], other=0)
    length = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1))
    gain = tl.maximum(
        tl.max(tl.abs(tl.load(img_gain + channel)), 0), tl.max(tl.abs(tl.load(txt_gain + channel)), 0)
    )
    bound = length * (gain.to(tl.float32) * (tl.sqrt(D * 1.0) * 1.01))
    shift = tl.maximum(bound - headroom, 0.0)
    acc = tl.zeros((M, D), tl.float32)
    total = tl.zeros((M, 8), tl.float32)
    acc, total = _over_keys(acc, total, q, shift, img, img_tokens, N, D, WIDTH, STAGES)
    acc, total = _over_keys(acc, total, q, shift, txt, txt_tokens, N, D, WIDTH, STAGES)
    out = acc / tl.sum(total, 1)[:, None]
    tl.store(target + row[:, None] * WIDTH + channel[None, :], out.to(dtype), mask=ok[:, None])
