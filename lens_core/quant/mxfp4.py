"""MXFP4: 32 four-bit floats share one power-of-two scale.

A byte holds two values, the first in its low nibble; a nibble is a sign and an e2m1 magnitude; a
scale byte b stands for 2 ** (b - 127) (e8m0, OCP Microscaling Formats 1.0). Blocks run along the
input dimension. Every product of a value and a scale that fits the exponent range is exact in
bf16, so this conversion loses nothing.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 32
# Blocks of one look-up when dequantising: 256 MB of indices.
_PIECE = 1 << 22
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Halfway between neighbours; a value exactly there becomes the smaller one.
_BOUNDARIES = tuple((low + high) / 2 for low, high in pairwise(MAGNITUDES))
# Keeps a block's scale byte at 5 or more, far from where scales and their inverses leave fp32.
_SMALLEST = 2.0**-120


@cache
def _pair_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """int64 [65536, 1 or 2]: the four values of every two bytes, as their bits, lowest nibble first."""
    values = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=dtype, device=device)
    pair = torch.arange(65536, device=device)
    codes = torch.stack([(pair >> shift) & 15 for shift in (0, 4, 8, 12)], dim=-1)
    return values[codes].view(torch.int64)


def unpack(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks u8 [..., G, 16] -> unscaled values [..., G, 32] in ``dtype`` (2 or 4 bytes wide).

    Two bytes at a time: one look-up writes four values, which is what bounds this on any device.
    """
    flat = blocks.flatten()
    if flat.storage_offset() % 2:  # a tensor that starts at an odd byte of a mapped file
        flat = flat.clone()
    pairs = flat.view(torch.uint16).int()
    values = _pair_table(dtype, blocks.device).index_select(0, pairs)
    return values.view(dtype).view(*blocks.shape[:-1], 2 * blocks.shape[-1])


def pack(codes: Tensor) -> Tensor:
    """Codes 0..15 u8 [..., K] -> bytes u8 [..., K/2], the first of two in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def nearest_codes(ratio: Tensor, signs: Tensor) -> Tensor:
    """Codes u8 of the values nearest to ``ratio`` (not negative, saturating at 6).

    ``signs`` is any fp32 tensor of the same shape with the signs, of zeros too.
    """
    codes = (signs.view(torch.int32) >> 31).to(torch.uint8).bitwise_and_(8)
    for boundary in _BOUNDARIES:
        codes += (ratio > boundary).view(torch.uint8)
    return codes


@cache
def _scaled_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[65536] integers: the two values of scale byte * 256 + code byte, as their bits, low nibble first."""
    values = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], device=device)
    byte = torch.arange(256, device=device)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=-1)
    scale = torch.exp2(byte.float() - 127)
    scaled = (pairs * scale[:, None, None]).to(dtype)
    return scaled.view(torch.int32 if dtype.itemsize == 2 else torch.int64).flatten()


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks u8 [..., G, 16] and scales u8 [..., G] -> values [..., 32 G] in ``dtype``.

    One look-up by scale and code together instead of a product; in pieces, to keep the look-up's indices
    small beside the result.
    """
    table = _scaled_table(dtype, blocks.device)
    codes, factors = blocks.flatten(0, -2), scales.flatten()
    out = torch.empty(codes.numel(), dtype=table.dtype, device=blocks.device)
    for start in range(0, len(codes), _PIECE):
        part = slice(start, start + _PIECE)
        index = torch.add(factors[part].int().mul_(256).unsqueeze(-1), codes[part])
        torch.index_select(table, 0, index.flatten(), out=out[16 * start : 16 * start + index.numel()])
    return out.view(dtype).view(*blocks.shape[:-2], -1)


def quantize(weight: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Nearest MXFP4 of weight [..., K], K a multiple of 32 -> blocks u8 [..., K/32, 16], scales u8.

    The shared exponent is floor(log2(largest)) - 2, so the largest value lands in [4, 8) and what
    exceeds 6 saturates (the rule of the OCP specification). What came out of ``dequantize`` is
    representable and comes back exactly, though perhaps as other bytes: a block whose largest code
    was below 4 gets a smaller scale. Runs on ``device`` (None: where the weight is) and returns
    there; takes 14 bytes a value of scratch, so give it one expert at a time.
    """
    groups = weight.to(device).float().unflatten(-1, (-1, BLOCK))
    ratio = groups.abs()
    largest = ratio.amax(-1, keepdim=True).clamp_min_(_SMALLEST)
    # The exponent is read off the bits: log2 rounds up just below a power of two.
    scale = (largest.view(torch.int32) >> 23) - 2
    ratio.mul_(((254 - scale) << 23).view(torch.float32))
    return pack(nearest_codes(ratio, groups)), scale.squeeze(-1).to(torch.uint8)
