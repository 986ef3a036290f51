"""The Triton kernels of quantised linears under the names and signatures of their definitions.

Limits of ``unpack``: 2^31 numbers, groups of an even size in 4 bits; of ``multiply``: ``why_not_multiply``.
Where there is no text, the image's tensors stand in for the text's, with nothing to touch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...quant import block_scales
from ...quant import linear as quant
from ...quant.linear import Packed, QuantizedRows
from .. import backend
from ..linear import Biases, aligned
from ..linear import unpack as plain_unpack
from . import block_scales_launch, linear, quantize
from .launcher import cdiv, launch, power_of_2

# 2 rows by 8 warps read and write at the memory's speed in the denoiser's norms, which do the same.
_ROWS, _ROW_WARPS = 2, 8
# Numbers a program unpacks, 32 a thread: some 13 programs a multiprocessor for the model's matrices.
_NUMBERS, _NUMBER_WARPS = 4096, 4
_LONGEST_CHUNK = 512
_MANTISSA = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
_GROUP = 8  # tiles in a column that run together and share its weights
_ROW_BYTES = 16  # of the widest loads, which rows must begin at


class Tile(NamedTuple):
    """What a program computes of [M, N], how much of K at a time, and by what."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def empty_rows(x: Tensor, kind: str) -> QuantizedRows:
    """Memory for the numbers and scales of contiguous x [..., K]."""
    values = torch.empty_like(x, dtype=quant.DTYPES[kind])
    return QuantizedRows(values, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32), x.dtype)


def quantize_rows(streams: Sequence[Tensor], kind: str) -> list[QuantizedRows]:
    """See ``kernels.linear.quantize_rows``; float8 on GPUs that convert to it."""
    streams = [x.contiguous() for x in streams]
    out = [empty_rows(x, kind) for x in streams]
    width = streams[0].shape[-1]
    counts = [x.numel() // width for x in streams]
    img, txt = out[0], out[-1]
    launch(
        quantize.quantize_rows,
        (sum(cdiv(count, _ROWS) for count in counts),),
        (
            *(streams[0], img.values, img.scale),
            *(streams[-1], txt.values, txt.scale),
            counts[0],
            counts[1] if len(counts) == 2 else 0,
        ),
        {"WIDTH": width, "BLOCK": power_of_2(width), "ROWS": _ROWS},
        _ROW_WARPS,
    )
    return out


def unpack(weights: Sequence[Packed], dtype: torch.dtype) -> list[Tensor]:
    """See ``kernels.linear.unpack``; weights alike in format and size."""
    form, values, scale, zero = weights[0]
    if block_scales.has(form):
        return block_scales_launch.unpack(weights, dtype)
    rows, columns = values.shape[0], values.shape[1] * 8 // form.bits
    options = _unpacking(rows, columns, form.bits, scale.numel(), values.dtype, zero is not None)
    if options is None:
        return plain_unpack(weights, dtype)
    out = [torch.empty(rows, columns, dtype=dtype, device=values.device) for _ in weights]
    img, txt = (
        (_bytes(packed), packed.scale, packed.scale if packed.zero is None else packed.zero, result)
        for packed, result in ((weights[0], out[0]), (weights[-1], out[-1]))
    )
    programs = cdiv(rows * columns, _NUMBERS)
    chunks = rows * columns // options["WIDTH"]
    launch(linear.unpack, (programs, len(weights)), (*img, *txt, chunks), options, _NUMBER_WARPS)
    return out


def _bytes(packed: Packed) -> Tensor:
    signed = packed.form.bits == 8 and packed.values.dtype == torch.int8
    return packed.values if signed else packed.values.view(torch.uint8)


@cache
def _unpacking(
    rows: int, columns: int, bits: int, scales: int, dtype: torch.dtype, zero: bool
) -> dict[str, Any] | None:
    """Constants of ``linear.unpack``: numbers that share a scale, in chunks of a power of two."""
    shared = rows * columns // scales
    width = min(shared & -shared, _LONGEST_CHUNK)
    if bits == 4 and width == 1:
        return None
    return {
        "WIDTH": width,
        "PER": 0 if scales == 1 else shared // width,
        "BITS": bits,
        "MANTISSA": _MANTISSA.get(dtype, 0),
        "ZERO": zero,
        "CHUNKS": _NUMBERS // width,
    }


def why_not_multiply(rows: int, columns: int) -> str | None:
    """The limit that a weight [rows, columns] does not meet, in words."""
    if columns % _ROW_BYTES:
        return f"a layer has {columns} inputs, no multiple of {_ROW_BYTES}"
    return None


def multiply(streams: Sequence[QuantizedRows], weights: Sequence[Packed], biases: Biases) -> list[Tensor]:
    """[B, T, N] of 8-bit streams [B, T, K] and weights that ``why_not_multiply`` lets pass."""
    rows, columns = weights[0].values.shape
    out = [x.scale.new_empty(*x.values.shape[:-1], rows, dtype=x.dtype) for x in streams]
    counts = [x.values.numel() // columns for x in streams]
    tile = choose_tile(sum(counts), rows, multiprocessors(out[0].device))
    layers = [
        (
            aligned(x.values),
            aligned(packed.values),
            y,
            x.scale.contiguous(),
            packed.scale.contiguous(),
            y if bias is None else bias,
        )
        for x, packed, y, bias in zip(streams, weights, out, biases, strict=True)
    ]
    tiles = sum(cdiv(count, tile.rows) for count in counts) * cdiv(rows, tile.columns)
    launch(
        linear.multiply,
        (tiles,),
        (*layers[0], *layers[-1], counts[0], counts[1] if len(counts) == 2 else 0),
        {
            "N": rows,
            "K": columns,
            "BM": tile.rows,
            "BN": tile.columns,
            "BK": tile.inner,
            "GROUP": _GROUP,
            "STAGES": tile.stages,
            "ONE_SCALE": weights[0].scale.numel() == 1,
            "BIAS": biases[0] is not None,
        },
        tile.warps,
    )
    return out


@cache
def choose_tile(m: int, n: int, multiprocessors: int) -> Tile:
    """The fastest for [m, n], of 13 on an H200 for 4096 and 8100 tokens: by plain pointers as fast as by
    tensor descriptors, whose launch takes the CPU four times as long. Small products take small tiles, so
    that all multiprocessors have work."""
    tiles = -(-m // 128) * -(-n // 128)
    if tiles < multiprocessors:
        return Tile(64, 128, 128, 4, 3)
    # 96 KiB of shared memory, which GPUs of compute capability 8.6 and 8.9 have just so.
    return Tile(128, 128, 128, 8, 3)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side."""
    if backend.interpreted():
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
