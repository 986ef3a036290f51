"""The denoiser's Triton kernels under the names and signatures of their definitions in ``kernels.block``.

Where there is no text, the image's pointers stand in for the text's, with no tokens to touch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..block import HeadNorms, Rows
from . import block

# Fastest of 8 to 16 on an H200 at 1024 x 1024 and 1440 x 1440 (rows or numbers a program, warps); others
# differ by a few per cent, all at the memory's speed.
_ROWS, _ROW_WARPS = 2, 8
_TOKENS, _TOKEN_WARPS = 2, 2
_NUMBERS, _NUMBER_WARPS = 2048, 8


def add_modulate(streams: Sequence[Rows], gate: int, shift: int) -> tuple[list[Tensor], list[Tensor]]:
    """See ``block.add_modulate``."""
    add, norm = streams[0].update is not None, streams[0].weight is not None
    totals: list[Tensor] = []
    normed: list[Tensor] = []
    operands: list[Tensor | float] = []
    for x, update, before, weight, eps, after in streams:
        x = x.contiguous()
        totals.append(torch.empty_like(x) if add else x)
        if norm:
            normed.append(torch.empty_like(x))
        operands += [
            x,
            x if update is None else update.contiguous(),
            totals[-1],
            normed[-1] if norm else x,
            x if before is None else before,
            x if weight is None else weight,
            x if after is None else after,
            x.shape[1],
            0 if before is None else before.stride(0),
            0 if after is None else after.stride(0),
            eps,
        ]
    batch, _, hidden = streams[0].x.shape
    programs = sum(triton.cdiv(rows.x.shape[1], _ROWS) for rows in streams)
    if len(streams) == 1:
        operands += [*operands[:7], 0, 0, 0, 0.0]
    block.add_modulate[(programs, batch)](
        *operands,
        H=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        ROWS=_ROWS,
        GATE=gate,
        SHIFT=shift,
        ADD=add,
        NORM=norm,
        num_warps=_ROW_WARPS,
    )
    return totals, normed


def joint_heads(
    streams: Sequence[Tensor], norms: Sequence[HeadNorms], rotary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``block.joint_heads``. Without text q and k are turned in place, and v stays where it is."""
    dim = 2 * rotary.shape[-1]
    streams = [qkv.contiguous() for qkv in streams]
    img, txt = streams[0], streams[-1]
    batch, tokens, width = img.shape
    heads = width // (3 * dim)
    text = txt.shape[1] if len(streams) == 2 else 0
    if text:
        out = torch.empty(3, batch, tokens + text, heads, dim, dtype=img.dtype, device=img.device)
    else:
        out = img.unflatten(-1, (3, heads, dim)).permute(2, 0, 1, 3, 4)
    programs = sum(triton.cdiv(qkv.shape[1], _TOKENS) for qkv in streams)
    block.joint_heads[(programs, 3 if text else 2, batch)](
        img,
        txt,
        out,
        rotary,
        *norms[0],
        *norms[-1],
        tokens,
        text,
        *out.stride()[:3],
        HEADS=heads,
        GROUP=heads & -heads,
        D=dim,
        ROWS=_TOKENS,
        num_warps=_TOKEN_WARPS,
    )
    q, k, v = out.unbind(0)
    return q, k, v


def swiglu(gates: Sequence[Tensor], ups: Sequence[Tensor]) -> list[Tensor]:
    """See ``block.swiglu``, in place of the gates."""
    gates, ups = [gate.contiguous() for gate in gates], [up.contiguous() for up in ups]
    programs = sum(triton.cdiv(gate.numel(), _NUMBERS) for gate in gates)
    block.swiglu[(programs,)](
        gates[0],
        ups[0],
        gates[-1],
        ups[-1],
        gates[0].numel(),
        gates[1].numel() if len(gates) == 2 else 0,
        BLOCK=_NUMBERS,
        num_warps=_NUMBER_WARPS,
    )
    return gates
