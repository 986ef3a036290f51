"""The denoiser's Triton kernels under the names and signatures of their definitions in ``kernels.block``.

Where there is no text, the image's pointers stand in for the text's, with no tokens to touch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..block import EXP2_HEADROOM, HeadNorms, Inputs, Rows
from . import block, joint_attention
from .launcher import cdiv, launch, power_of_2
from .linear_launch import empty_rows

# Fastest of 8 to 16 on an H200 at 1024 x 1024 and 1440 x 1440 (rows or numbers a program, warps); others
# differ by a few per cent, all at the memory's speed.
_ROWS, _ROW_WARPS = 2, 8
_TOKENS, _TOKEN_WARPS = 2, 2
_NUMBERS, _NUMBER_WARPS = 2048, 8
_GATE_WARPS = 8  # so that a row of 4096 gates and ups is 32 numbers a thread
_QUERIES, _KEYS = 128, 64


def add_modulate(
    streams: Sequence[Rows], gate: int, shift: int, kind: str | None = None
) -> tuple[list[Tensor], list[Inputs]]:
    """See ``block.add_modulate``."""
    batch, _, hidden = streams[0].x.shape
    add, norm = streams[0].update is not None, streams[0].weight is not None
    totals: list[Tensor] = []
    normed: list[Inputs] = []
    operands: list[Tensor | float] = []
    for x, update, before, weight, eps, after in streams:
        x = x.contiguous()
        totals.append(torch.empty_like(x) if add else x)
        values, scales = x, x
        if norm and kind is not None:
            quantized = empty_rows(x, kind)
            normed.append(quantized)
            values, scales, _ = quantized
        elif norm:
            values = torch.empty_like(x)
            normed.append(values)
        operands += [
            x,
            x if update is None else update.contiguous(),
            totals[-1],
            values,
            scales,
            x if before is None else before,
            x if weight is None else weight,
            x if after is None else after,
            x.shape[1],
            0 if before is None else before.stride(0) // hidden,
            0 if after is None else after.stride(0) // hidden,
            eps,
        ]
    programs = sum(cdiv(rows.x.shape[1], _ROWS) for rows in streams)
    if len(streams) == 1:
        operands += [*operands[:8], 0, 0, 0, 0.0]
    constants = {
        "H": hidden,
        "BLOCK": power_of_2(hidden),
        "ROWS": _ROWS,
        "GATE": gate,
        "SHIFT": shift,
        "ADD": add,
        "NORM": norm,
        "QUANTIZE": kind is not None,
    }
    launch(block.add_modulate, (programs, batch), operands, constants, _ROW_WARPS)
    return totals, normed


def joint_heads(
    streams: Sequence[Tensor], norms: Sequence[HeadNorms], rotary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``block.joint_heads``. Without text q and k are turned in place, and v stays where it is."""
    streams = [qkv.contiguous() for qkv in streams]
    batch, tokens, width = streams[0].shape
    heads = width // (6 * rotary.shape[-1])
    if len(streams) == 1:
        _turn(streams, streams, norms, rotary, strides=(1, 3 * tokens, 0, 3))
        q, k, v = streams[0].unflatten(-1, (3, heads, -1)).unbind(2)
    else:
        joint = tokens + streams[1].shape[1]
        out = streams[0].new_empty(3, batch, joint, heads, 2 * rotary.shape[-1])
        places = (out, out[:, :, tokens:])
        _turn(streams, places, norms, rotary, strides=(batch * joint, joint, joint, 1), parts=3)
        q, k, v = out
    return q, k, v


def attend(
    streams: Sequence[Tensor], norms: Sequence[HeadNorms], rotary: Tensor, image_only: bool
) -> list[Tensor]:
    """See ``block.attend``. Queries and keys are turned in place."""
    streams = [qkv.contiguous() for qkv in streams]
    batch, tokens, width = streams[0].shape
    dim = 2 * rotary.shape[-1]
    text = streams[1].shape[1] if len(streams) == 2 else 0
    factor = math.log2(math.e) / math.sqrt(dim)  # the softmax in powers of two
    _turn(streams, streams, norms, rotary, (1, 3 * tokens, 3 * text, 3), q_factor=factor)
    asking = streams[:1] if image_only else streams
    out = [qkv.new_empty(batch, qkv.shape[1], width // 3) for qkv in asking]
    programs = sum(cdiv(qkv.shape[1], _QUERIES) for qkv in asking)
    heads = width // (3 * dim)
    gains = norms[0].k, norms[-1].k
    launch(
        joint_attention.attend,
        (programs, heads, batch),
        (streams[0], streams[-1], out[0], out[-1], *gains, tokens, text, EXP2_HEADROOM),
        {"HEADS": heads, "D": dim, "M": _QUERIES, "N": _KEYS, "STAGES": 3},
        num_warps=8,
        maxnreg=128,  # so that two programs share a multiprocessor and fill each other's waits
    )
    return out


def _turn(
    streams: Sequence[Tensor],
    out: Sequence[Tensor],
    norms: Sequence[HeadNorms],
    rotary: Tensor,
    strides: tuple[int, int, int, int],
    parts: int = 2,
    q_factor: float = 1.0,
) -> None:
    """Launch ``turn_heads`` for q and k (2 parts) and v (3); ``strides`` are its part's, the image's and the
    text's, and its token's."""
    img, txt = streams[0], streams[-1]
    batch, tokens, width = img.shape
    dim = 2 * rotary.shape[-1]
    heads = width // (3 * dim)
    text = txt.shape[1] if len(streams) == 2 else 0
    programs = sum(cdiv(qkv.shape[1], _TOKENS) for qkv in streams)
    constants = {
        "HEADS": heads,
        "GROUP": heads & -heads,
        "D": dim,
        "ROWS": _TOKENS,
        "TOKEN_STRIDE": strides[3],
    }
    given = (*norms[0], *norms[-1], q_factor)
    operands = (img, txt, out[0], out[-1], rotary.contiguous(), *given, tokens, text, *strides[:3])
    launch(block.turn_heads, (programs, parts, batch), operands, constants, _TOKEN_WARPS)


def swiglu(gates: Sequence[Tensor], ups: Sequence[Tensor], kind: str | None = None) -> list[Inputs]:
    """See ``block.swiglu``; in place of the gates where nothing is quantised."""
    gates, ups = [gate.contiguous() for gate in gates], [up.contiguous() for up in ups]
    width = gates[0].shape[-1]
    counts = [gate.numel() // width for gate in gates]
    text = counts[1] if len(gates) == 2 else 0
    if kind is not None:
        out = [empty_rows(gate, kind) for gate in gates]
        image, words = (gates[0], ups[0], *out[0][:2]), (gates[-1], ups[-1], *out[-1][:2])
        constants = {"WIDTH": width, "BLOCK": power_of_2(width), "ROWS": 1}
        rows = (*image, *words, counts[0], text)
        launch(block.swiglu_quantized, (sum(counts),), rows, constants, _GATE_WARPS)
        return list(out)
    programs = sum(cdiv(gate.numel(), _NUMBERS) for gate in gates)
    constants = {"WIDTH": width, "BLOCK": _NUMBERS}
    operands = (gates[0], ups[0], gates[-1], ups[-1], counts[0], text)
    launch(block.swiglu, (programs,), operands, constants, _NUMBER_WARPS)
    return list(gates)
