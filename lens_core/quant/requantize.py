"""A changed weight, quantised again as it was: the same format, shapes and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kitchen
from .layer_format import AFFINE
from .linear import Packed, pack_nibbles, rotate
from .linear import quantize as quantize_definition

_NOT_ZERO = 1e-12


def requantize(weight: Tensor, like: Packed) -> Packed:
    """Weight [N, K] in the format of ``like``, whose own numbers do not matter; it may be without memory."""
    form = like.form
    if kitchen.has(form):
        made = kitchen.quantize(weight, form)
    elif form.name == AFFINE:
        made = quantize_definition(weight, form)
    else:
        made = _symmetric(rotate(weight.float(), form.rotation), like)
    tensors = [
        None if new is None or old is None else new.to(old.dtype).reshape(old.shape)
        for new, old in zip(made[1:], like[1:], strict=True)
    ]
    return Packed(form, *tensors)  # type: ignore[arg-type]


def _symmetric(weight: Tensor, like: Packed) -> Packed:
    """Numbers times a scale: one for each row, or one for all, as ``like`` has it."""
    floats = like.values.dtype.is_floating_point
    largest = torch.finfo(like.values.dtype).max if floats else 2 ** (like.form.bits - 1) - 1
    by_row = like.scale.numel() > 1
    peak = weight.abs().amax(-1, keepdim=True) if by_row else weight.abs().amax()
    scale = peak.clamp_min(_NOT_ZERO) / largest
    numbers = (weight / scale).clamp(-largest, largest)
    if not floats:
        numbers = numbers.round().to(torch.int8)
    if like.form.bits == 4:
        return Packed(like.form, pack_nibbles(numbers).view(like.values.dtype), scale)
    return Packed(like.form, numbers, scale)
