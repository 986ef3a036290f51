"""Sink attention of a packed batch: rotation, prefix, window, sinks and grouped heads in one kernel.

A program takes a tile of consecutive queries of one prompt, for all heads that share one key head: their
rows lie side by side, so a key is read and rotated once for all of them. The softmax runs online; a sink
is a score that is there before the first key, with a value of nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .experts import multiply


@triton.jit
def _rotated(at, table, row_ok, column, HALF: tl.constexpr):
    """Both halves of x rotated, in x's dtype: rows at ``at`` [R, 1], angles at ``table`` [R, 1]."""
    first = tl.load(at + column, mask=row_ok, other=0)
    second = tl.load(at + HALF + column, mask=row_ok, other=0)
    cos = tl.load(table + column, mask=row_ok, other=0)
    sin = tl.load(table + HALF + column, mask=row_ok, other=0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    return (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)


@triton.jit
def _step(
    q1, q2, k1, k2, value, acc, top, total, query_at, key_at, key_ok, scale, window, dtype: tl.constexpr
):  # fmt: skip
    """One tile of keys into the online softmax; positions decide who sees whom."""
    scores = multiply(
        q2, tl.trans(k2), multiply(q1, tl.trans(k1), tl.zeros((q1.shape[0], k1.shape[0]), tl.float32))
    )
    behind = query_at[:, None] - key_at[None, :]
    seen = (behind >= 0) & (behind < window) & key_ok[None, :]
    scores = tl.where(seen, scores * scale, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp(scores - higher[:, None])
    shrink = tl.exp(top - higher)
    acc = multiply(weights.to(dtype), value, acc * shrink[:, None])
    return acc, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
def attention(
    q, k, v, past, sinks, table, positions, tiles, out, scale, window, q_stride, kv_stride,
    HEADS: tl.constexpr, SHARED: tl.constexpr, HALF: tl.constexpr, PREFIX: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """q, out [T, HEADS, D]; k, v [T, SHARED, D]; q's, and k's and v's, tokens at strides of their own; past
    [2, PREFIX, SHARED, D], rotated; tiles [n, 4]: first key's token, first query's token, end, whether the
    prefix is seen; table [T, D]: cosines, then sines."""
    D: tl.constexpr = 2 * HALF
    GROUP: tl.constexpr = HEADS // SHARED
    ROWS: tl.constexpr = GROUP * QUERIES
    tile = tl.program_id(0)
    shared = tl.program_id(1)
    first = tl.load(tiles + 4 * tile)
    start = tl.load(tiles + 4 * tile + 1)
    stop = tl.load(tiles + 4 * tile + 2)
    after = tl.load(tiles + 4 * tile + 3)
    row = tl.arange(0, ROWS)
    token = start + row // GROUP
    head = shared * GROUP + row % GROUP
    row_ok = token < stop
    column = tl.arange(0, HALF)[None, :]
    query_at = tl.load(positions + token, mask=row_ok, other=0)
    q_at = q + (token * q_stride + head * D)[:, None]
    q1, q2 = _rotated(q_at, table + token[:, None] * D, row_ok[:, None], column, HALF)
    top = tl.load(sinks + head).to(tl.float32)
    total = tl.full((ROWS,), 1.0, tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    lane = tl.arange(0, KEYS)
    wide = tl.arange(0, D)[None, :]
    dtype: tl.constexpr = q.dtype.element_ty
    if after != 0:
        for begin in range(0, PREFIX, KEYS):
            key = begin + lane
            key_ok = key < PREFIX
            at = past + (key * SHARED + shared)[:, None] * D
            k1 = tl.load(at + column, mask=key_ok[:, None], other=0)
            k2 = tl.load(at + HALF + column, mask=key_ok[:, None], other=0)
            value = tl.load(at + PREFIX * SHARED * D + wide, mask=key_ok[:, None], other=0)
            acc, top, total = _step(
                q1, q2, k1, k2, value, acc, top, total, query_at, key, key_ok, scale, window, dtype
            )  # fmt: skip
    begin = first
    end = tl.minimum(start + QUERIES, stop)
    while begin < end:
        key = begin + lane
        key_ok = key < end
        at = (key * kv_stride + shared * D)[:, None]
        k1, k2 = _rotated(k + at, table + key[:, None] * D, key_ok[:, None], column, HALF)
        value = tl.load(v + at + wide, mask=key_ok[:, None], other=0)
        key_at = tl.load(positions + key, mask=key_ok, other=0)
        acc, top, total = _step(
            q1, q2, k1, k2, value, acc, top, total, query_at, key_at, key_ok, scale, window, dtype
        )  # fmt: skip
        begin += KEYS
    result = (acc / total[:, None]).to(dtype)
    tl.store(out + (token * HEADS + head)[:, None] * D + wide, result, mask=row_ok[:, None])
