"""The Triton kernels under the names and signatures of their definitions in ``kernels.eager``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .. import eager
from ..bank import Bank, DenseMatrices, PackedMatrices
from ..plan import AttentionPlan
from . import attention as attention_kernels
from . import experts as expert_kernels
from . import small

# Row tile -> (row block, word block, warps) of gate_up and of down; fastest of 48 on an H200 for 12, 172
# and 415 tokens. Three stages in all of them.
_TILES = {
    16: ((64, 32, 4), (64, 32, 4)),
    32: ((64, 32, 4), (128, 32, 4)),
    64: ((64, 32, 4), (128, 32, 8)),
}
_CHUNK = 1024
# Queries of one attention program (times the heads that share keys), and keys at a time.
_QUERIES, _KEYS = 16, 64


def add_norm(
    x: Tensor, updates: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """See ``eager.add_norm``."""
    tokens, hidden = x.shape
    slots = 0 if updates is None else updates.shape[1]
    total = x if updates is None else torch.empty_like(x)
    normed = None if weight is None else torch.empty(tokens, hidden, dtype=dtype, device=x.device)
    small.add_norm[(tokens,)](
        x,
        x if updates is None else updates.contiguous(),
        x if weight is None else weight,
        total,
        total if normed is None else normed,
        eps,
        H=hidden,
        SLOTS=slots,
        NORM=weight is not None,
        BLOCK=triton.next_power_of_2(hidden),
        num_warps=8,
    )
    return total, normed


def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See ``eager.route``."""
    tokens, hidden = x.shape
    chosen = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
    routing = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    small.route[(tokens,)](
        x.contiguous(),
        weight,
        bias,
        chosen,
        routing,
        H=hidden,
        EXPERTS=weight.shape[0],
        TOP_K=top_k,
        BLOCK=min(1024, triton.next_power_of_2(hidden)),
        num_warps=8,
    )
    return chosen, routing


def attention(
    q: Tensor, k: Tensor, v: Tensor, past: Tensor, sinks: Tensor, plan: AttentionPlan, sliding: bool
) -> Tensor:
    """See ``eager.attention``."""
    (_, heads, dim), shared = q.shape, k.shape[1]
    tiles = plan.tiles(_QUERIES)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    attention_kernels.attention[(len(tiles), shared)](
        q,
        k,
        v,
        past,
        sinks,
        plan.table(),
        plan.positions,
        tiles,
        out,
        dim**-0.5,
        plan.window if sliding else 1 << 30,
        q.stride(0),
        k.stride(0),
        HEADS=heads,
        SHARED=shared,
        HALF=dim // 2,
        PREFIX=plan.prefix,
        QUERIES=_QUERIES,
        KEYS=_KEYS,
        num_warps=4,
    )
    return out


def experts(x: Tensor, chosen: Tensor, routing: Tensor, bank: Bank) -> Tensor:
    """See ``eager.experts``, which also serves a dense bank: PyTorch's own product is the fast one there."""
    if isinstance(bank.gate_up, DenseMatrices) or isinstance(bank.down, DenseMatrices):
        return eager.experts(x, chosen, routing, bank)
    pairs, slots = chosen.numel(), chosen.shape[1]
    count, hidden = bank.down.bias.shape
    inner = bank.gate_up.bias.shape[1] // 2
    source, offsets = _sorted(chosen, count)
    tile = tile_rows(pairs, count)
    # As many tiles as there can be: known without asking the device how many there are.
    tiles = min(pairs, triton.cdiv(pairs, tile) + count - 1)
    middle = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    out = torch.empty(pairs, hidden, dtype=torch.float32, device=x.device)
    first, second = _TILES[tile]
    expert_kernels.gate_up[_grid(tiles, inner, first)](
        planes(x),
        source,
        *_operands(bank.gate_up),
        middle,
        offsets,
        tiles,
        K=hidden,
        N=inner,
        TOP_K=slots,
        ALPHA=bank.alpha,
        LIMIT=bank.limit,
        **_settings(bank.gate_up, x, tile, first),
    )
    expert_kernels.down[_grid(tiles, hidden, second)](
        middle,
        source,
        routing,
        *_operands(bank.down),
        out,
        offsets,
        tiles,
        K=inner,
        N=hidden,
        **_settings(bank.down, x, tile, second),
    )
    return out.unflatten(0, (-1, slots))


def tile_rows(pairs: int, count: int) -> int:
    """The smallest tile that takes most experts' rows at once: 1.25 times the mean, for the spread."""
    wanted = 1.25 * pairs / count
    return next((rows for rows in _TILES if wanted <= rows), max(_TILES))


def planes(x: Tensor) -> Tensor:
    """x [T, K] in the kernels' order: elements 0, 4, 8, ... first, then 1, 5, 9, ..., and so on."""
    return x.view(len(x), -1, 4).transpose(1, 2).reshape(x.shape)


def _sorted(chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pair numbers in expert order, stable, and each expert's start (and the last one's end)."""
    pairs = chosen.numel()
    source = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
    offsets = torch.empty(count + 1, dtype=torch.int32, device=chosen.device)
    chunks = triton.cdiv(pairs, _CHUNK)
    small.sort_pairs[(count,)](
        chosen.contiguous(), source, offsets, pairs, EXPERTS=count, CHUNKS=chunks, BLOCK=_CHUNK
    )
    return source, offsets


def _grid(tiles: int, rows: int, block: tuple[int, int, int]) -> tuple[int]:
    return (tiles * triton.cdiv(rows, block[0]),)


def _operands(matrices: PackedMatrices) -> tuple[Tensor, ...]:
    # A pointer that the mxfp4 kernel never reads stands in for the scale that it does not have.
    scale = matrices.scales if matrices.scale is None else matrices.scale
    return matrices.blocks.view(torch.int16), matrices.scales, scale, matrices.bias


def _settings(matrices: PackedMatrices, x: Tensor, tile: int, block: tuple[int, int, int]) -> dict[str, Any]:
    rows, words, warps = block
    return {
        "EXPERTS": matrices.bias.shape[0],
        "GROUP": matrices.format.group,
        "NVFP4": matrices.format.name == "nvfp4",
        # PTX decodes into bf16; AMD and the interpreter have none.
        "PTX": x.is_cuda and torch.version.hip is None and x.dtype == torch.bfloat16,
        "BM": tile,
        "BN": rows,
        "BB": words,
        "num_warps": warps,
        "num_stages": 3,
    }
