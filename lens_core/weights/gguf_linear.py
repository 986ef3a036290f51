"""Linear weights in GGUF's block types as numbers with a scale and a zero point: number * scale + zero.

A GGUF packs a row of K inputs in blocks of 32 (Q4_0 to Q8_0) or 256 (K-quants). What a block means is affine
in groups of 32 or 16 inputs, so a ``quant.linear.Packed`` holds it without loss: number and scale have at
most 24 significant bits together (Q6_K: 6 and 18), so their product is exact in fp32, and the sum with the
zero point is rounded once, as GGUF's own formula is. Blocks of 32 have their scale and zero point in fp16,
or one that is a power of two times the other, so both stay fp16; those of K-quants are products of fp16 and
integers, for which that is too little.

N rows, B blocks a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quant.layer_format import AFFINE, LayerFormat
from ..quant.linear import Packed, pack_nibbles
from .gguf import GgufCheckpoint
from .tensor_info import DTYPES, TensorInfo

# numbers u8 [N, B, block], scale fp32 [N, B, block / group], zero like scale
Decoded = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF's: ``block`` numbers of ``bits`` in ``nbytes``, a scale for each ``group`` of them.

    ``decode`` makes Decoded of blocks u8 [N, B, nbytes].
    """

    bits: int
    group: int
    block: int
    nbytes: int
    decode: Callable[[Tensor], Decoded]

    @property
    def form(self) -> LayerFormat:
        """How a weight of this type is held: 4 bits stay 4, more take a byte."""
        return LayerFormat(AFFINE, 4 if self.bits == 4 else 8, self.group)

    @property
    def scale_dtype(self) -> torch.dtype:
        """The smallest dtype that holds every scale and zero point of a good file exactly."""
        return torch.float16 if self.block == self.group else torch.float32


def _halves(raw: Tensor) -> Tensor:
    """u8 [..., 2 n], little-endian fp16 -> fp32 [..., n]; a copy, since a file may hold them at odd bytes."""
    return raw.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """u8 [..., n] -> [..., 2 n]: the low nibbles of all bytes first, then the high ones."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)


def _bits(raw: Tensor, shifts: range, mask: int) -> Tensor:
    """u8 [..., n] -> [..., len(shifts), n]: all bytes shifted by each of ``shifts`` and masked."""
    return torch.stack([(raw >> shift) & mask for shift in shifts], dim=-2)


def _fifth_bits(raw: Tensor) -> Tensor:
    """u8 [..., 4] -> [..., 32], 0 or 16: bit i of the little-endian word is that of number i."""
    return _bits(raw, range(8), 1).transpose(-1, -2).flatten(-2) << 4


def _q4_0(blocks: Tensor) -> Decoded:
    scale, numbers = blocks.split((2, 16), dim=-1)
    scale = _halves(scale)
    return _nibbles(numbers), scale, -8 * scale


def _q4_1(blocks: Tensor) -> Decoded:
    scale, zero, numbers = blocks.split((2, 2, 16), dim=-1)
    return _nibbles(numbers), _halves(scale), _halves(zero)


def _q5_0(blocks: Tensor) -> Decoded:
    scale, high, low = blocks.split((2, 4, 16), dim=-1)
    scale = _halves(scale)
    return _nibbles(low) | _fifth_bits(high), scale, -16 * scale


def _q5_1(blocks: Tensor) -> Decoded:
    scale, zero, high, low = blocks.split((2, 2, 4, 16), dim=-1)
    return _nibbles(low) | _fifth_bits(high), _halves(scale), _halves(zero)


def _q8_0(blocks: Tensor) -> Decoded:
    scale, numbers = blocks.split((2, 32), dim=-1)
    scale = _halves(scale)
    return numbers ^ 128, scale, -128 * scale  # int8's bits with the sign turned over are the number + 128


def _k_scales(factors: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N, B, 8] of a K-quant: two fp16 factors, [N, B, 4] bytes, of 6-bit integers.

    Of the 12 bytes ``packed``, the first four hold scales 0 to 3 in their low 6 bits, the next four the
    minima 0 to 3, the last four the low nibbles of scales (low) and minima (high) 4 to 7, whose upper two
    bits are the upper two of the first eight bytes.
    """
    scales, minima, low = packed.split(4, dim=-1)
    scales = torch.cat((scales & 63, (low & 15) | (scales >> 6 << 4)), dim=-1)
    minima = torch.cat((minima & 63, (low >> 4) | (minima >> 6 << 4)), dim=-1)
    of_scales, of_minima = _halves(factors).split(1, dim=-1)
    return of_scales * scales, -of_minima * minima


def _q4_k(blocks: Tensor) -> Decoded:
    factors, scales, low = blocks.split((4, 12, 128), dim=-1)
    numbers = _nibbles(low.unflatten(-1, (4, 32)))  # two groups of 32 in 32 bytes
    return numbers.flatten(-2), *_k_scales(factors, scales)


def _q5_k(blocks: Tensor) -> Decoded:
    factors, scales, high, low = blocks.split((4, 12, 32, 128), dim=-1)
    numbers = _nibbles(low.unflatten(-1, (4, 32))).flatten(-2)
    fifth = _bits(high, range(8), 1).flatten(-2) << 4  # bit g of byte i: number i of group g
    return numbers | fifth, *_k_scales(factors, scales)


def _q6_k(blocks: Tensor) -> Decoded:
    low, high, scales, factor = blocks.split((128, 64, 16, 2), dim=-1)
    numbers = _nibbles(low.unflatten(-1, (2, 64)))  # each half block: 128 numbers in 64 bytes
    upper = _bits(high.unflatten(-1, (2, 32)), range(0, 8, 2), 3).flatten(-2) << 4
    scale = _halves(factor) * scales.view(torch.int8)
    return (numbers | upper).flatten(-2), scale, -32 * scale


TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(4, 32, 32, 18, _q4_0),
    "Q4_1": BlockType(4, 32, 32, 20, _q4_1),
    "Q5_0": BlockType(5, 32, 32, 22, _q5_0),
    "Q5_1": BlockType(5, 32, 32, 24, _q5_1),
    "Q8_0": BlockType(8, 32, 32, 34, _q8_0),
    "Q4_K": BlockType(4, 32, 256, 144, _q4_k),
    "Q5_K": BlockType(5, 32, 256, 176, _q5_k),
    "Q6_K": BlockType(6, 16, 256, 210, _q6_k),
}


def decode(raw: Tensor, kind: str) -> Decoded:
    """Rows u8 [N, bytes of a row] of the type ``kind`` -> numbers u8 [N, K], scale and zero fp32
    [N, K / group], where the bytes are."""
    numbers, scale, zero = TYPES[kind].decode(raw.unflatten(-1, (-1, TYPES[kind].nbytes)))
    return numbers.flatten(-2), scale.flatten(-2), zero.flatten(-2)


def empty(size: tuple[int, int], kind: str, device: str = "cpu") -> Packed:
    """Memory for a weight [N, K] of the type ``kind``."""
    rows, columns = size
    row = TYPES[kind]
    values = torch.empty(rows, columns * row.form.bits // 8, dtype=torch.uint8, device=device)
    scale = torch.empty(rows, columns // row.group, dtype=row.scale_dtype, device=device)
    return Packed(row.form, values, scale, torch.empty_like(scale))


def repack(info: TensorInfo, layer: str) -> Packed:
    """The stored weight [N, K] of a layer, of a type in ``TYPES``, on the CPU, some rows of it at a time.

    Raises CheckpointError where a scale or zero point is no number, or too large for any good file.
    """
    rows, columns = info.shape
    packed = empty((rows, columns), info.dtype)
    form, values, scale, zero = packed
    assert zero is not None
    for start, stop in info.pieces():
        numbers, scale[start:stop], zero[start:stop] = decode(info.bytes(start, stop), info.dtype)
        values[start:stop] = pack_nibbles(numbers) if form.bits == 4 else numbers
    if not (scale.isfinite().all() and zero.isfinite().all()):
        raise CheckpointError(
            f"{info.path.name} is damaged: the weight of {layer}, in {info.dtype}, has scales that are no "
            "numbers or far too large. Download it again."
        )
    return packed


def gguf_layers(checkpoint: GgufCheckpoint, source: Mapping[str, str]) -> dict[str, tuple[LayerFormat, str]]:
    """The linears whose weights are stored in blocks: layer name -> (how it is held, its GGUF type).

    ``source`` gives the stored name of each tensor (``keymap.rename``); layers are named as in the module,
    without ``.weight``. Plain numbers are not in it, nor is any tensor of another rank, which
    ``GgufCheckpoint.read`` unpacks. Raises CheckpointError for a type that is not in ``TYPES``.
    """
    layers = {}
    for name, stored in source.items():
        info = checkpoint.header[stored]
        if not name.endswith(".weight") or len(info.shape) != 2 or info.dtype in DTYPES:
            continue
        kind = TYPES.get(info.dtype)
        if kind is None:
            raise CheckpointError(
                f"{checkpoint.name} stores {stored} as {info.dtype}; this version reads "
                f"{', '.join(TYPES)}, F32, F16 and BF16. Choose a file of one of these, such as q8_0."
            )
        if info.shape[1] % kind.block:
            raise CheckpointError(
                f"{checkpoint.name} is damaged: {stored} has rows of {info.shape[1]:,} numbers, which are "
                f"no whole blocks of {kind.block} as {info.dtype} has them. Download it again."
            )
        layers[name.removesuffix(".weight")] = kind.form, info.dtype
    return layers
