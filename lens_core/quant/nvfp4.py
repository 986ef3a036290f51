"""NVFP4: 16 four-bit floats share an e4m3 scale, and every expert has one fp32 factor.

Values are MXFP4's (e2m1) and are packed the same way here, the first of two in the low nibble and 32
to a row of ``blocks``, so that both formats share their unpacking. Files store them otherwise (high
nibble first, scales in cuBLAS' tiled order); ``weights.banks`` reorders when it loads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mxfp4 import nearest_codes, pack, unpack

GROUP = 16
_LARGEST_E4M3 = 448.0
_LARGEST_E2M1 = 6.0


def dequantize(blocks: Tensor, scales: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [..., N, K] in ``dtype``, rounded once from the fp32 product.

    blocks u8 [..., N, K/32, 16], scales u8 (e4m3 bytes) [..., N, K/16], scale fp32 [...], one per
    expert.
    """
    factors = scales.view(torch.float8_e4m3fn).float().mul_(scale.float()[..., None, None])
    values = unpack(blocks, torch.float32).view(*scales.shape, GROUP)
    return values.mul_(factors.unsqueeze(-1)).flatten(-2).to(dtype)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest NVFP4 of weight [..., N, K], K a multiple of 32 -> blocks, scales, scale as above.

    An expert's factor puts its largest scale at e4m3's largest, and a scale puts the largest of its
    16 values at 6, as rounded to e4m3.
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    scale = largest.amax((-2, -1)).clamp_min(1e-30) / (_LARGEST_E4M3 * _LARGEST_E2M1)
    scales = (largest / _LARGEST_E2M1 / scale[..., None, None]).to(torch.float8_e4m3fn)
    factors = scales.float() * scale[..., None, None]
    ratio = groups.abs() / factors.clamp_min(1e-30).unsqueeze(-1)
    blocks = pack(nearest_codes(ratio, groups).flatten(-2)).unflatten(-1, (-1, GROUP))
    return blocks, scales.view(torch.uint8), scale
