"""The Triton kernels of quantised linears under the names and signatures of their definitions.

Limits of ``unpack``: 2^31 numbers, groups of an even size in 4 bits; of ``multiply``: ``why_not_multiply``.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...quant import linear as quant
from ...quant.linear import Packed, QuantizedRows
from .. import backend
from . import linear, quantize

# 2 rows by 8 warps read and write at the memory's speed in the denoiser's norms, which do the same.
_ROWS, _ROW_WARPS = 2, 8
# Numbers a program unpacks, 32 a thread: some 13 programs a multiprocessor for the model's matrices.
_NUMBERS, _NUMBER_WARPS = 4096, 4
_LONGEST_CHUNK = 512
_MANTISSA = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
_GROUP = 8  # tiles in a column that run together and share its weights
_ALIGNED = 16  # bytes of a tensor descriptor's base and strides, and of the widest loads


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


def quantize_rows(x: Tensor, kind: str) -> QuantizedRows:
    """See ``quant.linear.quantize_rows``; float8 on GPUs that convert to it."""
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    out = empty_rows(x, kind)
    quantize.quantize_rows[(triton.cdiv(rows, _ROWS),)](
        x,
        out.values,
        out.scale,
        rows,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        ROWS=_ROWS,
        num_warps=_ROW_WARPS,
    )
    return out


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """See ``quant.linear.unpack``."""
    form, values, scale, zero = packed
    columns = values.shape[1] * 8 // form.bits
    # Numbers that share a scale, in chunks of a power of two.
    shared = packed.rows * columns // scale.numel()
    width = min(shared & -shared, _LONGEST_CHUNK)
    if form.bits == 4 and width == 1:
        return quant.unpack(packed, dtype)
    mantissa = _MANTISSA.get(values.dtype, 0)
    signed_bytes = form.bits == 8 and not mantissa
    out = torch.empty(packed.rows, columns, dtype=dtype, device=values.device)
    chunks = out.numel() // width
    programs = triton.cdiv(out.numel(), _NUMBERS)
    linear.unpack[(programs,)](
        values.contiguous() if signed_bytes else values.contiguous().view(torch.uint8),
        scale.contiguous(),
        scale if zero is None else zero.contiguous(),
        out,
        chunks,
        WIDTH=width,
        PER=0 if scale.numel() == 1 else shared // width,
        BITS=form.bits,
        MANTISSA=mantissa,
        ZERO=zero is not None,
        CHUNKS=_NUMBERS // width,
        num_warps=_NUMBER_WARPS,
    )
    return out


def why_not_multiply(packed: Packed) -> str | None:
    """The limit that a weight [N, K] does not meet, in words."""
    rows, columns = packed.values.shape
    if columns % _ALIGNED or 2 * rows % _ALIGNED:
        return f"a layer has {columns} inputs and {rows} outputs, no multiples of 16 and 8"
    return None


def multiply(x: QuantizedRows, packed: Packed, bias: Tensor | None) -> Tensor:
    """[..., N] of int8 x [..., K] and a weight that ``why_not_multiply`` lets pass."""
    values = aligned(x.values.flatten(0, -2))
    m, k = values.shape
    n = packed.rows
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    hopper = on_hopper(x.device)
    tile = choose_tile(m, n, multiprocessors(x.device), hopper)
    tiles = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
    operands = values, aligned(packed.values), out.view(m, n)
    scale = packed.scale.float().contiguous()
    options = {
        **{"N": n, "K": k, "BM": tile.rows, "BN": tile.columns, "BK": tile.inner},
        **{"GROUP": _GROUP, "STAGES": tile.stages, "num_warps": tile.warps},
        **{"ONE_SCALE": scale.numel() == 1, "BIAS": bias is not None},
    }
    rest = x.scale.contiguous(), scale, scale if bias is None else bias, m
    if hopper:
        _multiply_hopper(operands, rest, tile, tiles, multiprocessors(x.device), options)
    else:
        linear.multiply[(tiles,)](*operands, *rest, **options)
    return out


def _multiply_hopper(
    operands: tuple[Tensor, ...], rest: tuple, tile: Tile, tiles: int, programs: int, options: dict
) -> None:
    blocks = [tile.rows, tile.inner], [tile.columns, tile.inner], [tile.rows, tile.columns]
    described = [TensorDescriptor.from_tensor(x, block) for x, block in zip(operands, blocks, strict=True)]
    linear.multiply_hopper[(min(tiles, programs),)](*described, *rest, PROGRAMS=programs, **options)


def choose_tile(m: int, n: int, multiprocessors: int, hopper: bool) -> Tile:
    """The fastest for [m, n].

    Larger tiles read less, but all multiprocessors must have work, and where they take several tiles each,
    the last ones leave some idle: 128 x 256 needs two rounds to win on an H200 (fastest of 6 tiles each way,
    by plain pointers and descriptors, for 200, 4096 and 8100 tokens). Without descriptors the tiles are what
    fits 64 KiB of shared memory, which every GPU of compute capability 8 has; they are not measured there.
    """

    def rounds(rows: int, columns: int) -> float:
        return math.ceil(m / rows) * math.ceil(n / columns) / multiprocessors

    inner = 128 if hopper else 64
    if hopper and rounds(128, 256) >= 2:
        return Tile(128, 256, inner, 8, 3)
    return Tile(128 if rounds(128, 128) >= 1 else 64, 128, inner, 4, 4)


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and where 16 bytes can be read at once."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNED == 0 else x.clone()


@cache
def on_hopper(device: torch.device) -> bool:
    """Whether products go through tensor descriptors; tiles are chosen for this generation alone."""
    if backend.interpreted() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side."""
    if backend.interpreted():
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
