"""What a denoiser block does between its matrix products: the definitions, in plain PyTorch.

Streams come as a sequence: the image's first, the text's after it if there is any. Faster kernels round
only where these store: what the definitions round in between, they keep in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.linear import QuantizedRows, quantize_rows

# The parts of a modulation table [B, 6 H]: shift, scale and gate of attention, then of the MLP.
PARTS = 6
ATTENTION_SHIFT, ATTENTION_GATE, MLP_SHIFT, MLP_GATE = 0, 2, 3, 5

# ``attend`` by Triton subtracts from a row's scores so much that two is raised to EXP2_HEADROOM at most:
# far from fp32's overflow at 128 with values of 1.4e5 and 10,000 keys. With scores up to SCORE_LIMIT (81 as
# powers of two) even a row whose largest is -SCORE_LIMIT stays above its underflow at -126.
EXP2_HEADROOM = 60.0
SCORE_LIMIT = 56.0


# What a linear takes: numbers as they are, or 8-bit ones and a scale for each row.
Inputs = Tensor | QuantizedRows


class Rows(NamedTuple):
    """One stream where a gated update ends and a modulated norm begins.

    ``x`` [B, T, H] is the residual stream, ``update`` [B, T, H] what is added to it times the gate in the
    table ``before`` [B, 6 H]; ``weight`` [H] and ``eps`` are the norm's, shift and scale are in the table
    ``after``. Without ``update`` the stream stays as it is, without ``weight`` nothing is normalised.
    """

    x: Tensor
    update: Tensor | None
    before: Tensor | None
    weight: Tensor | None = None
    eps: float = 0.0
    after: Tensor | None = None


class HeadNorms(NamedTuple):
    """Weights [D] and epsilon of one stream's norms of queries and keys."""

    q: Tensor
    k: Tensor
    eps: float


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive norm's affine part: x [B, T, H], shift and scale [B, 1, H]."""
    return x * (1 + scale) + shift


def part_of(table: Tensor, index: int) -> Tensor:
    """One part of a table [B, 6 H], as [B, 1, H]."""
    hidden = table.shape[-1] // PARTS
    return table[:, None, index * hidden : (index + 1) * hidden]


def add_modulate(
    streams: Sequence[Rows], gate: int, shift: int, kind: str | None = None
) -> tuple[list[Tensor], list[Inputs]]:
    """x + gate * update of each stream, and RMSNorm of that, modulated (empty where nothing is normalised).

    ``gate`` and ``shift`` are parts of the tables; the scale follows the shift. The second result is for
    linears, and quantised where these want a ``kind``.
    """
    totals: list[Tensor] = []
    normed: list[Inputs] = []
    for x, update, before, weight, eps, after in streams:
        total = x if update is None or before is None else x + part_of(before, gate) * update
        totals.append(total)
        if weight is not None and after is not None:
            norm = F.rms_norm(total, total.shape[-1:], weight, eps)
            out = modulate(norm, part_of(after, shift), part_of(after, shift + 1))
            normed.append(out if kind is None else quantize_rows(out, kind))
    return totals, normed


def rotate_pairs(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate adjacent channels of x [B, T, heads, D] by cosines and sines [2, T, D / 2], in fp32."""
    cos, sin = rotary[0, :, None, :], rotary[1, :, None, :]
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def joint_heads(
    streams: Sequence[Tensor], norms: Sequence[HeadNorms], rotary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Projections [B, T, 3 H] of each stream -> q, k, v [B, sum T, heads, D], q and k normed and rotated.

    ``rotary`` is [2, sum T, D / 2] in fp32. The projections may be overwritten.
    """
    dim = 2 * rotary.shape[-1]
    parts = []
    for qkv, norm in zip(streams, norms, strict=True):
        q, k, v = qkv.unflatten(-1, (3, -1, dim)).unbind(-3)
        parts.append((F.rms_norm(q, (dim,), norm.q, norm.eps), F.rms_norm(k, (dim,), norm.k, norm.eps), v))
    q, k, v = parts[0] if len(parts) == 1 else (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
    return rotate_pairs(q, rotary), rotate_pairs(k, rotary), v


def attend(
    streams: Sequence[Tensor], norms: Sequence[HeadNorms], rotary: Tensor, image_only: bool
) -> list[Tensor]:
    """Softmax attention over projections [B, T, 3 H] of each stream -> [B, T, H] of each, or of the image's.

    The projections may be overwritten. Faster kernels count on ``score_bound`` of ``norms``.
    """
    q, k, v = (x.transpose(1, 2) for x in joint_heads(streams, norms, rotary))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    parts = list(out.split([qkv.shape[1] for qkv in streams], dim=1))
    return parts[:1] if image_only else parts


def score_bound(largest_q: float, largest_k: float, head_dim: int) -> float:
    """The largest |q k| / sqrt(D) that norms with these largest weights let through: RMSNorm makes vectors of
    length sqrt(D), and a rotation keeps it."""
    return largest_q * largest_k * head_dim**0.5


def swiglu(gates: Sequence[Tensor], ups: Sequence[Tensor], kind: str | None = None) -> list[Inputs]:
    """silu(gate) * up of each stream, [B, T, inner], quantised where the linears after it want a ``kind``.
    The gates may be overwritten."""
    out = [F.silu(gate) * up for gate, up in zip(gates, ups, strict=True)]
    return [x if kind is None else quantize_rows(x, kind) for x in out]
