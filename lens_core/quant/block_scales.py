"""mxfp8 and nvfp4 unpacked in plain PyTorch: floats of 8 or 4 bits, a scale for each few in cuBLAS' order.

mxfp8: float8_e4m3fn, and for each 32 a power of two (e8m0). nvfp4: float4_e2m1, for each 16 a float8_e4m3fn,
and an fp32 factor for the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_format import LayerFormat

FORMATS = frozenset({"mxfp8", "nvfp4"})
# Scales lie in tiles of so many rows and groups; in a tile, four rows 32 apart side by side.
TILE_ROWS, TILE_GROUPS = 128, 4


def has(form: LayerFormat) -> bool:
    """Whether ``form`` is one of them."""
    return form.name in FORMATS


def unblock(scale: Tensor, rows: int, groups: int) -> Tensor:
    """Scales [R, C] of whole tiles in cuBLAS' order -> [rows, groups], row by row."""
    height, width = scale.shape
    tiles = scale.reshape(height // TILE_ROWS, width // TILE_GROUPS, 32, TILE_ROWS // 32, TILE_GROUPS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(height, width)[:rows, :groups]


def unpack(
    form: LayerFormat, values: Tensor, scale: Tensor, factor: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] in ``dtype``, rounded once from the fp32 product, as comfy-kitchen's is in fp32.

    values float8_e4m3fn [N, K] or u8 [N, K / 2]; scale [R, C] in any 8-bit dtype; factor fp32, of nvfp4.
    """
    numbers = values.float() if form.bits == 8 else float4(values)
    rows, columns = numbers.shape
    byte = unblock(scale.view(torch.uint8), rows, columns // form.group)
    e4m3 = byte.view(torch.float8_e4m3fn)
    scales = power_of_2(byte) if factor is None else e4m3.float() * factor.float()
    return (numbers.unflatten(-1, (-1, form.group)) * scales[..., None]).flatten(-2).to(dtype)


def power_of_2(byte: Tensor) -> Tensor:
    """2^(byte - 127) in fp32, exactly, the subnormal 2^-127 of byte 0 too; NaN of 255."""
    bits = (byte.int() << 23).masked_fill(byte == 0, 1 << 22)
    return bits.view(torch.float32).masked_fill(byte == 255, float("nan"))


def float4(values: Tensor) -> Tensor:
    """u8 [..., K / 2] of two float4_e2m1 each, the first in the high bits -> fp32 [..., K]."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=values.device)
    nibbles = torch.stack([values >> 4, values & 15], dim=-1).flatten(-2)
    return torch.cat([table, -table])[nibbles.int()]
