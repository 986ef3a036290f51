"""The VAE's Triton kernels under the names and signatures of their definitions in ``kernels.strips``.

They take strips with their channels together (``torch.channels_last``), whole rows of them. What they only
read is copied into that layout if it has another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..strips import PARTS
from . import strips
from .launcher import cdiv, launch, power_of_2

# Numbers in flight in a program of four warps: 32 a thread, so that with their sums and squares they stay in
# registers.
_NUMBERS, _WARPS = 4096, 4
_AFFINE_WARPS = 8


def add_moments(strip: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """See ``strips.add_moments``."""
    _check(strip)
    channels = strip.shape[1]
    pixels, block, at_once = _tiles(strip)
    share = at_once * cdiv(cdiv(pixels, PARTS), at_once)
    programs = cdiv(pixels, share)
    moments = torch.empty(programs, 3, channels, dtype=torch.float32, device=strip.device)
    constants = {
        "C": channels,
        "BLOCK": block,
        "PIXELS": at_once,
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
    }
    # What is not there is never looked at: the strip stands in for it.
    added = strip if bias is None else bias, strip if residual is None else _together(residual)
    launch(strips.add_moments, (programs,), (strip, *added, moments, pixels, share), constants, _WARPS)
    return moments


def affine(moments: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """See ``strips.affine``."""
    parts, _, channels = moments.shape
    scale, shift = torch.empty(2, 1, channels, 1, 1, dtype=torch.float32, device=moments.device)
    group = channels // groups
    block = power_of_2(group)
    constants = {"C": channels, "GROUP": group, "BLOCK": block, "PARTS": max(1, _NUMBERS // block)}
    operands = (moments.contiguous(), weight, bias, scale, shift, parts, eps)
    launch(strips.affine, (groups,), operands, constants, _AFFINE_WARPS)
    return scale, shift


def normalise_silu(window: Tensor, piece: Tensor, scale: Tensor, shift: Tensor) -> None:
    """See ``strips.normalise_silu``."""
    _check(window)
    pixels, block, at_once = _tiles(piece)
    constants = {"C": piece.shape[1], "BLOCK": block, "PIXELS": at_once}
    operands = (window, _together(piece), scale, shift, pixels)
    launch(strips.normalise_silu, (cdiv(pixels, at_once),), operands, constants, _WARPS)


def double(window: Tensor, piece: Tensor) -> None:
    """See ``strips.double``."""
    _check(window)
    pixels, block, at_once = _tiles(piece)
    rows = window.shape[2] // piece.shape[2]
    constants = {"C": piece.shape[1], "BLOCK": block, "PIXELS": at_once, "ROWS": rows}
    operands = (window, _together(piece), pixels, piece.shape[3])
    launch(strips.double, (cdiv(pixels, at_once),), operands, constants, _WARPS)


def _tiles(strip: Tensor) -> tuple[int, int, int]:
    """Pixels of a strip; a power of two of channels and how many pixels of these a program sees at once."""
    _, channels, rows, width = strip.shape
    block = power_of_2(channels)
    return rows * width, block, max(1, _NUMBERS // block)


def _check(written: Tensor) -> None:
    if not written.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{list(written.shape)} with strides {written.stride()} has not its channels together"
        )


def _together(read: Tensor) -> Tensor:
    return read.contiguous(memory_format=torch.channels_last)
