"""What a block does between its matrix products, in fp64 and by other means than the definitions: complex
numbers for the rotation, exponentials for the gate, one head at a time for attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lens_core.kernels.block import HeadNorms, Rows


def part(table: Tensor, index: int) -> Tensor:
    """One of the six parts of a table [B, 6 H], as [B, 1, H]."""
    return table.double().reshape(len(table), 6, 1, -1)[:, index]


def total(rows: Rows, gate: int) -> Tensor:
    """The stream with its gated update."""
    if rows.update is None:
        return rows.x.double()
    assert rows.before is not None
    return rows.x.double() + rows.update.double() * part(rows.before, gate)


def normed(x: Tensor, rows: Rows, shift: int) -> Tensor:
    """x over its root mean square, weighted and modulated."""
    assert rows.weight is not None and rows.after is not None
    mean_square = (x.double() ** 2).sum(-1, keepdim=True) / x.shape[-1]
    scaled = x.double() / (mean_square + rows.eps).sqrt() * rows.weight.double()
    return scaled + scaled * part(rows.after, shift + 1) + part(rows.after, shift)


def turned(x: Tensor, weight: Tensor, eps: float, angle: Tensor) -> Tensor:
    """x [B, T, heads, D] over its root mean square, weighted and turned by angles [T, D / 2]."""
    mean_square = (x.double() ** 2).sum(-1, keepdim=True) / x.shape[-1]
    scaled = x.double() / (mean_square + eps).sqrt() * weight.double()
    numbers = torch.view_as_complex(scaled.unflatten(-1, (-1, 2)).contiguous())
    turns = torch.polar(torch.ones_like(angle, dtype=torch.float64), angle.double())
    return torch.view_as_real(numbers * turns[:, None]).flatten(-2)


def heads(
    streams: Sequence[Tensor], norms: Sequence[HeadNorms], angle: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Projections [B, T, 3 H] -> q and k, normed and turned, and v, all [B, sum T, heads, D]."""
    parts: list[list[Tensor]] = [[], [], []]
    first, dim = 0, 2 * angle.shape[-1]
    for qkv, norm in zip(streams, norms, strict=True):
        q, k, v = (x.unflatten(-1, (-1, dim)) for x in qkv.chunk(3, dim=-1))
        turns = angle[first : first + qkv.shape[1]]
        first += qkv.shape[1]
        parts[0].append(turned(q, norm.q, norm.eps, turns))
        parts[1].append(turned(k, norm.k, norm.eps, turns))
        parts[2].append(v.double())
    q, k, v = (torch.cat(stream, dim=1) for stream in parts)
    return q, k, v


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over [B, T, heads, D] -> [B, T, heads * D], a picture and a head at a time."""
    out = torch.empty(v.shape, dtype=torch.float64)
    for picture in range(len(q)):
        for head in range(q.shape[2]):
            query, key, value = (x[picture, :, head].double() for x in (q, k, v))
            scores = query @ key.T / math.sqrt(q.shape[-1])
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            out[picture, :, head] = weights @ value / weights.sum(-1, keepdim=True)
    return out.flatten(2)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU of the gate times up."""
    gate = gate.double()
    return gate / (1 + (-gate).exp()) * up.double()
