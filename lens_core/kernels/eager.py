"""The definitions, in plain PyTorch: what every faster kernel must equal within its rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import Bank, DenseMatrices, PackedMatrices
from .plan import AttentionPlan


def add_norm(
    x: Tensor, updates: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Residual stream x fp32 [T, H] plus the sum of updates [T, slots, H], and its RMSNorm in ``dtype``.

    The stream stays in fp32 through all layers: 48 roundings to bf16 would cost more than the layers do.
    """
    if updates is not None:
        x = x + updates.float().sum(1)
    if weight is None:
        return x, None
    return x, F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps).to(dtype)


def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """x [T, H] -> chosen experts int32 [T, top_k] and their weights fp32, softmax over the chosen only.

    Logits in fp32: rounded to bf16, as the reference has them, near ties fall to the wrong expert.
    """
    logits = F.linear(x.float(), weight.float(), bias.float())
    values, chosen = logits.topk(top_k, dim=-1)
    return chosen.int(), values.softmax(-1)


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [T, heads, D] in fp32; channel i pairs with channel i + D / 2 (not adjacent ones)."""
    cos, sin = table.unsqueeze(2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, past: Tensor, sinks: Tensor, plan: AttentionPlan, sliding: bool
) -> Tensor:
    """q [T, heads, D], k and v [T, kv heads, D], not rotated -> [T, heads, D].

    ``past`` [2, P, kv heads, D] are the prefix's keys, rotated, and values.
    """
    q, k = rotate_halves(q, plan.rotary), rotate_halves(k, plan.rotary)
    parts = []
    for block in plan.blocks:
        keys, values = k[block.first : block.stop], v[block.first : block.stop]
        if block.after:
            keys, values = torch.cat([past[0], keys]), torch.cat([past[1], values])
        mask = plan.mask(block, sinks, sliding)
        parts.append(sink_attention(q[block.start : block.stop], keys, values, mask))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sink_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [n, heads, D], k and v [m, kv heads, D], mask [heads, n, m + 1] (last: the sinks) -> like q.

    A sink is one logit per head that joins the softmax's denominator and nothing else: exactly one more
    key and value of zeros, whose score, the query's product with zero, is what the mask says. Heads that
    share keys are laid along the queries, so nothing is repeated.
    """
    length, heads, dim = q.shape
    shared = k.shape[1]
    query = q.unflatten(1, (shared, -1)).permute(1, 2, 0, 3).reshape(1, shared, -1, dim)
    key, value = (F.pad(x, (0, 0, 0, 0, 0, 1)).transpose(0, 1).unsqueeze(0) for x in (k, v))
    scores = mask.unflatten(0, (shared, -1)).flatten(1, 2).unsqueeze(0)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=scores)
    return out.unflatten(2, (-1, length))[0].permute(2, 0, 1, 3).reshape(length, heads, dim)


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """[..., 2 I] with gate and up interleaved -> [..., I].

    gate * sigmoid(alpha * gate) * (up + 1), gate clamped from above, up from both sides.
    """
    gate, up = gate_up[..., 0::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def experts(x: Tensor, chosen: Tensor, routing: Tensor, bank: Bank) -> Tensor:
    """x [T, H], chosen [T, K], routing [T, K] -> weighted results fp32 [T, K, H], one row per pair."""
    return (_grouped if _has_grouped_product(x) else _one_by_one)(x, chosen, routing, bank)


def _has_grouped_product(x: Tensor) -> bool:
    if not x.is_cuda or x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(x.device) >= (8, 0)


def _one_by_one(x: Tensor, chosen: Tensor, routing: Tensor, bank: Bank) -> Tensor:
    """Only the experts that some token chose, in turn; waits for the device once to learn which."""
    slots = chosen.shape[1]
    flat = chosen.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=bank.down.bias.shape[0])
    out = torch.empty(len(flat), x.shape[1], dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            pairs = order[start : start + count]
            start += count
            gate_up = F.linear(x[pairs // slots], *_expert(bank.gate_up, expert, x))
            hidden = clamped_swiglu(gate_up, bank.alpha, bank.limit)
            out[pairs] = F.linear(hidden, *_expert(bank.down, expert, x)).float()
    return out.unflatten(0, (-1, slots)) * routing.unsqueeze(-1)


def _expert(matrices: PackedMatrices | DenseMatrices, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
    bias = matrices.bias[index].to(like)
    if isinstance(matrices, DenseMatrices):
        return matrices.weight[index].to(like), bias
    scale = None if matrices.scale is None else matrices.scale[index]
    blocks, scales = matrices.blocks[index], matrices.scales[index]
    return matrices.format.dequantize(blocks, scales, scale, like.dtype), bias


def _grouped(x: Tensor, chosen: Tensor, routing: Tensor, bank: Bank) -> Tensor:
    """The whole bank dequantised, then one grouped product: no waiting, 1.6 GB of scratch at full size."""
    slots = chosen.shape[1]
    flat = chosen.flatten().long()
    order = flat.argsort(stable=True)
    expert = flat[order]
    count = bank.down.bias.shape[0]
    ends = torch.searchsorted(expert, torch.arange(count, device=x.device), right=True).int()
    hidden = _product(x[order // slots], bank.gate_up, expert, ends)
    hidden = clamped_swiglu(hidden, bank.alpha, bank.limit).to(x.dtype)
    out = _product(hidden, bank.down, expert, ends) * routing.flatten()[order, None]
    return torch.empty_like(out).index_copy_(0, order, out).unflatten(0, (-1, slots))


def _product(x: Tensor, matrices: PackedMatrices | DenseMatrices, expert: Tensor, ends: Tensor) -> Tensor:
    """Rows of x in the order of their expert, times its matrix, plus its bias; fp32."""
    weight = dense(matrices, x.dtype)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends).float() + matrices.bias[expert].float()


def dense(matrices: PackedMatrices | DenseMatrices, dtype: torch.dtype) -> Tensor:
    """The weights [E, N, K] in ``dtype``."""
    if isinstance(matrices, DenseMatrices):
        return matrices.weight.to(dtype)
    return matrices.format.dequantize(matrices.blocks, matrices.scales, matrices.scale, dtype)
