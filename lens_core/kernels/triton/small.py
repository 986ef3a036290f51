"""What lies between the matrix products of a GPT-OSS layer: residual and norm, routing, sorting."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm(
    x, updates, weight, total, normed, eps,
    H: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total = x + the sum of a token's SLOTS update rows; normed = RMSNorm(total) * weight. All in fp32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ok = column < H
    row = tl.load(x + token * H + column, mask=ok, other=0).to(tl.float32)
    for slot in tl.static_range(SLOTS):
        at = updates + (token * SLOTS + slot) * H + column
        row += tl.load(at, mask=ok, other=0).to(tl.float32)
    if SLOTS > 0:
        tl.store(total + token * H + column, row, mask=ok)
    if NORM:
        scale = tl.rsqrt(tl.sum(row * row, 0) / H + eps)
        result = row * scale * tl.load(weight + column, mask=ok, other=0).to(tl.float32)
        tl.store(normed + token * H + column, result.to(normed.dtype.element_ty), mask=ok)


@triton.jit
def route(
    x, weight, bias, chosen, routing,
    H: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: fp32 logits over the experts, the TOP_K largest (ties: the lower index), their softmax."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    column = tl.arange(0, BLOCK)
    logits = tl.load(bias + expert).to(tl.float32)
    for start in range(0, H, BLOCK):
        ok = start + column < H
        row = tl.load(x + token * H + start + column, mask=ok, other=0).to(tl.float32)
        at = weight + expert[:, None] * H + start + column[None, :]
        logits += tl.sum(tl.load(at, mask=ok[None, :], other=0).to(tl.float32) * row[None, :], 1)
    best = tl.max(logits, 0)
    scores = tl.zeros((EXPERTS,), tl.float32)
    left = logits
    for slot in tl.static_range(TOP_K):
        largest = tl.max(left, 0)
        index = tl.min(tl.where(left == largest, expert, EXPERTS), 0)
        tl.store(chosen + token * TOP_K + slot, index)
        scores = tl.where(expert == index, tl.exp(largest - best), scores)
        left = tl.where(expert == index, float("-inf"), left)
    scores = scores / tl.sum(scores, 0)
    for slot in tl.static_range(TOP_K):
        index = tl.load(chosen + token * TOP_K + slot)
        tl.store(routing + token * TOP_K + slot, tl.sum(tl.where(expert == index, scores, 0.0), 0))


@triton.jit
def sort_pairs(
    chosen, source, offsets, pairs, EXPERTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):
    """One expert: where its (token, slot) pairs start, and their numbers in order. A stable sort."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = 0
    for chunk in range(CHUNKS):
        pair = chunk * BLOCK + lane
        before += tl.sum((tl.load(chosen + pair, mask=pair < pairs, other=EXPERTS) < expert).to(tl.int32))
    end = before
    for chunk in range(CHUNKS):
        pair = chunk * BLOCK + lane
        mine = (tl.load(chosen + pair, mask=pair < pairs, other=EXPERTS) == expert).to(tl.int32)
        tl.store(source + end + tl.cumsum(mine, 0) - 1, pair, mask=mine == 1)
        end += tl.sum(mine)
    tl.store(offsets + expert, before)
    if expert == EXPERTS - 1:
        tl.store(offsets + EXPERTS, end)
