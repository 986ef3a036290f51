"""Expert layer over packed 4-bit weights: gather, matrix product, activation, product, routing weight.

Two kernels read the checkpoint's bytes as they are. What makes them fast:

* the tokens' side is narrow (a prompt gives an expert a few dozen rows), so the operands are swapped:
  acc[N, M] = W[N, K] @ x[M, K]^T, W decoded into registers, a tile of M tokens as small as 16;
* a byte holds an even and an odd k, so K is split into those two planes instead of being interleaved:
  sum_k w[k] x[k] = W_low @ x_even + W_high @ x_odd. The first kernel writes its result in planes again;
* e2m1 bits moved to the top of a bf16's exponent and mantissa are the value times 2^-126 (0.5 is a
  subnormal there), so decoding is two shifts and two masks for a pair, and one exact product with a
  bf16 holding scale * 2^126 (PTX on NVIDIA; plain integer arithmetic elsewhere and in the interpreter);
* all tiles of one expert run side by side, so a weight is fetched from memory once;
* which expert a tile belongs to is searched on the device: no host synchronisation;
* every (token, slot) pair has its own row of the result: no atomics, the same bits every time.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter has no inline assembly, and its dot multiplies bf16 operands as raw integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# From two 16-bit words (four codes each) and their pair of bf16 factors to the four planes' pairs.
_DECODE = tl.constexpr(
    """
    {
    .reg .b32 t, u, z;
    mov.b32 z, 0x80008000;
    shl.b32 t, $4, 6;
    shl.b32 u, $4, 12;
    and.b32 t, t, 0x01C001C0;
    lop3.b32 t, u, 0x80008000, t, 0xEA;
    fma.rn.bf16x2 $0, t, $5, z;
    shl.b32 t, $4, 2;
    shl.b32 u, $4, 8;
    and.b32 t, t, 0x01C001C0;
    lop3.b32 t, u, 0x80008000, t, 0xEA;
    fma.rn.bf16x2 $1, t, $5, z;
    shr.b32 t, $4, 2;
    shl.b32 u, $4, 4;
    and.b32 t, t, 0x01C001C0;
    lop3.b32 t, u, 0x80008000, t, 0xEA;
    fma.rn.bf16x2 $2, t, $5, z;
    shr.b32 t, $4, 6;
    and.b32 t, t, 0x01C001C0;
    lop3.b32 t, $4, 0x80008000, t, 0xEA;
    fma.rn.bf16x2 $3, t, $5, z;
    }
    """
)


@triton.jit
def _tile_of(offsets, pid, experts: tl.constexpr, block_m: tl.constexpr):
    """Expert, first row and end row of a tile; expert == experts where there is no such tile."""
    index = tl.arange(0, experts)
    end = tl.load(offsets + index + 1)
    tiles = tl.cumsum((end - tl.load(offsets + index) + block_m - 1) // block_m, 0)
    expert = tl.sum((tiles <= pid).to(tl.int32))
    before = tl.max(tl.where(tiles <= pid, tiles, 0))
    start = tl.load(offsets + tl.minimum(expert, experts - 1))
    stop = tl.load(offsets + tl.minimum(expert, experts - 1) + 1)
    return expert, start + (pid - before) * block_m, stop


@triton.jit
def _factor(scales, nvfp4: tl.constexpr, ptx: tl.constexpr):
    """Scale bytes times 2^126 (e8m0) or 2^110 (e4m3, which would overflow): bf16 for PTX, else fp32."""
    bits = scales.to(tl.int32)
    if nvfp4:
        # 2^120 lifts e4m3's exponent bias of 7 to fp32's 127; 2^110 is left for the codes.
        factor = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120 * 2.0**110
        if ptx:
            factor = factor.to(tl.bfloat16)
    elif ptx:
        factor = ((bits + 126) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        factor = ((bits + 126) << 23).to(tl.float32, bitcast=True)
    return factor


@triton.jit
def _code(words, plane: tl.constexpr, factor, dtype: tl.constexpr):
    """A plane's e2m1 codes: as fp32 bits they are the value times 2^-126."""
    code = words >> (4 * plane)
    value = (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True)
    return (value * factor).to(dtype)


@triton.jit
def multiply(a, b, acc):
    """acc + a @ b."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def _accumulate(
    acc, words, scales, x0, x1, x2, x3, group: tl.constexpr, ptx: tl.constexpr, nvfp4: tl.constexpr
):
    """acc[BN, BM] += W[BN, 4 BB] @ x, W as words i16 [BN, BB] and scales u8 [BN, 4 BB / group]."""
    rows: tl.constexpr = words.shape[0]
    width: tl.constexpr = words.shape[1]
    per: tl.constexpr = group // 4
    dtype: tl.constexpr = x0.dtype
    factor = tl.expand_dims(_factor(scales, nvfp4, ptx), 2)
    factor = tl.reshape(tl.broadcast_to(factor, (rows, width // per, per)), (rows, width))
    if ptx:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _DECODE,
            "=r,=r,=r,=r,r,r",
            [words, factor],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            True,
            2,
        )
    else:
        n = words.to(tl.int32)
        w0, w1 = _code(n, 0, factor, dtype), _code(n, 1, factor, dtype)
        w2, w3 = _code(n, 2, factor, dtype), _code(n, 3, factor, dtype)
    return multiply(w3, x3, multiply(w2, x2, multiply(w1, x1, multiply(w0, x0, acc))))


@triton.jit
def _load(at, rows_ok, columns_ok, whole: tl.constexpr):
    """A tile; where every column exists (``whole``) only rows are masked."""
    return tl.load(at, mask=rows_ok if whole else rows_ok & columns_ok, other=0)


@triton.jit
def gate_up(
    x, source, words, scales, scale, bias, out, offsets, tiles,
    K: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, GROUP: tl.constexpr,
    NVFP4: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, PTX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """out[pair, :] = swiglu(W x + bias), pairs in expert order; x and out in planes; W has 2 N rows."""
    pid = tl.program_id(0)
    expert, first, stop = _tile_of(offsets, pid % tiles, EXPERTS, BM)
    if expert < EXPERTS:
        Q: tl.constexpr = K // 4
        G: tl.constexpr = K // GROUP
        PER: tl.constexpr = GROUP // 4
        WHOLE: tl.constexpr = Q % BB == 0
        n = (pid // tiles) * BN + tl.arange(0, BN)
        m = first + tl.arange(0, BM)
        n_ok, m_ok = n < N, m < stop
        token = tl.load(source + m, mask=m_ok, other=0) // TOP_K
        b = tl.arange(0, BB)
        g = tl.arange(0, BB // PER)
        row = expert.to(tl.int64) * 2 * N + 2 * n
        w_at = words + row[:, None] * Q + b[None, :]
        s_at = scales + row[:, None] * G + g[None, :]
        x_at = x + token[None, :].to(tl.int64) * K + b[:, None]
        gate = tl.zeros((BN, BM), tl.float32)
        up = tl.zeros((BN, BM), tl.float32)
        for k in range(0, Q, BB):
            k_ok = k + b < Q
            g_ok = (k // PER + g < G)[None, :]
            x0 = _load(x_at + k, m_ok[None, :], k_ok[:, None], WHOLE)
            x1 = _load(x_at + k + Q, m_ok[None, :], k_ok[:, None], WHOLE)
            x2 = _load(x_at + k + 2 * Q, m_ok[None, :], k_ok[:, None], WHOLE)
            x3 = _load(x_at + k + 3 * Q, m_ok[None, :], k_ok[:, None], WHOLE)
            w_gate = _load(w_at + k, n_ok[:, None], k_ok[None, :], WHOLE)
            w_up = _load(w_at + Q + k, n_ok[:, None], k_ok[None, :], WHOLE)
            s_gate = _load(s_at + k // PER, n_ok[:, None], g_ok, WHOLE)
            s_up = _load(s_at + G + k // PER, n_ok[:, None], g_ok, WHOLE)
            gate = _accumulate(gate, w_gate, s_gate, x0, x1, x2, x3, GROUP, PTX, NVFP4)
            up = _accumulate(up, w_up, s_up, x0, x1, x2, x3, GROUP, PTX, NVFP4)
        if NVFP4:
            whole = tl.load(scale + expert) * 65536.0
            gate *= whole
            up *= whole
        gate += tl.load(bias + row, mask=n_ok, other=0).to(tl.float32)[:, None]
        up += tl.load(bias + row + 1, mask=n_ok, other=0).to(tl.float32)[:, None]
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        result = gate * tl.sigmoid(ALPHA * gate) * (up + 1)
        plane = n // 4 + (n % 4) * (N // 4)
        at = out + m[None, :].to(tl.int64) * N + plane[:, None]
        tl.store(at, result.to(out.dtype.element_ty), mask=n_ok[:, None] & m_ok[None, :])


@triton.jit
def down(
    x, source, routing, words, scales, scale, bias, out, offsets, tiles,
    K: tl.constexpr, N: tl.constexpr, EXPERTS: tl.constexpr, GROUP: tl.constexpr,
    NVFP4: tl.constexpr, PTX: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """out[pair, :] = routing weight * (W x + bias), pair = token * slots + slot; x in expert order."""
    pid = tl.program_id(0)
    expert, first, stop = _tile_of(offsets, pid % tiles, EXPERTS, BM)
    if expert < EXPERTS:
        Q: tl.constexpr = K // 4
        G: tl.constexpr = K // GROUP
        PER: tl.constexpr = GROUP // 4
        WHOLE: tl.constexpr = Q % BB == 0
        n = (pid // tiles) * BN + tl.arange(0, BN)
        m = first + tl.arange(0, BM)
        n_ok, m_ok = n < N, m < stop
        b = tl.arange(0, BB)
        g = tl.arange(0, BB // PER)
        row = expert.to(tl.int64) * N + n
        w_at = words + row[:, None] * Q + b[None, :]
        s_at = scales + row[:, None] * G + g[None, :]
        x_at = x + m[None, :].to(tl.int64) * K + b[:, None]
        acc = tl.zeros((BN, BM), tl.float32)
        for k in range(0, Q, BB):
            k_ok = k + b < Q
            g_ok = (k // PER + g < G)[None, :]
            x0 = _load(x_at + k, m_ok[None, :], k_ok[:, None], WHOLE)
            x1 = _load(x_at + k + Q, m_ok[None, :], k_ok[:, None], WHOLE)
            x2 = _load(x_at + k + 2 * Q, m_ok[None, :], k_ok[:, None], WHOLE)
            x3 = _load(x_at + k + 3 * Q, m_ok[None, :], k_ok[:, None], WHOLE)
            codes = _load(w_at + k, n_ok[:, None], k_ok[None, :], WHOLE)
            group = _load(s_at + k // PER, n_ok[:, None], g_ok, WHOLE)
            acc = _accumulate(acc, codes, group, x0, x1, x2, x3, GROUP, PTX, NVFP4)
        if NVFP4:
            acc *= tl.load(scale + expert) * 65536.0
        acc += tl.load(bias + row, mask=n_ok, other=0).to(tl.float32)[:, None]
        pair = tl.load(source + m, mask=m_ok, other=0)
        acc *= tl.load(routing + pair, mask=m_ok, other=0)[None, :]
        at = out + pair[None, :].to(tl.int64) * N + n[:, None]
        tl.store(at, acc, mask=n_ok[:, None] & m_ok[None, :])
