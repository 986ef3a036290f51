"""Quantised weights of linears as plain tensors, and what they mean: the definitions in plain PyTorch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .layer_format import AFFINE, FLOAT8, INT8, LayerFormat

LARGEST = {FLOAT8: 448.0, INT8: 127.0}
DTYPES = {FLOAT8: torch.float8_e4m3fn, INT8: torch.int8}
_NOT_ZERO = 1e-12  # where a row is all zeros, so is what it is divided by
# How far int4's range is tried below the smallest and largest of a group: rounding the few far ones worse
# rounds all others better.
_RANGES = tuple(1 - step / 20 for step in range(8))
_LINES = 3  # drawn anew through the numbers after each; more gain nothing


class Packed(NamedTuple):
    """A weight [N, K] in ``form``: ``values`` [N, K] in 8 bits or u8 [N, K / 2] in 4, the first of two in the
    low ones; ``scale`` fp32 of all, [N] or [N, 1], or in bf16, fp16 or fp32 [N, K / group]; ``zero`` like a
    group's scale, or None. Of comfy-kitchen's formats these are the tensors that its files have, in their
    order."""

    form: LayerFormat
    values: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def rows(self) -> int:
        """N, the layer's outputs."""
        return self.values.shape[0]


class QuantizedRows(NamedTuple):
    """Inputs [B, T, K]: ``values`` in 8 bits, ``scale`` fp32 [B, T, 1], and the ``dtype`` to go on in."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device


def quantize_rows(x: Tensor, kind: str) -> QuantizedRows:
    """Nearest 8-bit numbers to x [..., K]; a row's largest becomes the kind's largest."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(_NOT_ZERO) / LARGEST[kind]
    scaled = (wide / scale).clamp(-LARGEST[kind], LARGEST[kind])
    values = scaled.round() if kind == INT8 else scaled
    return QuantizedRows(values.to(DTYPES[kind]), scale, x.dtype)


def dequantize_rows(rows: QuantizedRows) -> Tensor:
    """[..., K] in the rows' dtype."""
    return (rows.values.float() * rows.scale).to(rows.dtype)


def as_tensor(x: Tensor | QuantizedRows) -> Tensor:
    """Inputs as they are, or as they were."""
    return x if isinstance(x, Tensor) else dequantize_rows(x)


def quantize(weight: Tensor, form: LayerFormat, search: bool = False, seed: int | None = None) -> Packed:
    """Nearest numbers of ``form`` to weight [N, K].

    float8: one scale for the weight, as ComfyUI's files have it. int8: one for each row. Affine formats: from
    a group's smallest to its largest, scale and zero point in bf16; with ``search``, the part of that range
    that leaves the smallest squared error; with a ``seed``, numbers rounded up or down by chance, so that
    changes smaller than a step are not lost in the mean.
    """
    wide = weight.float()
    if form.name == AFFINE:
        return _quantize_groups(wide, form, search, seed)
    if form.kind == FLOAT8:
        scale = wide.abs().amax().clamp_min(_NOT_ZERO) / LARGEST[FLOAT8]
        return Packed(form, (wide / scale).to(torch.float8_e4m3fn), scale)
    if form.kind == INT8:
        rows = quantize_rows(rotate(wide, form.rotation), INT8)
        return Packed(form, rows.values, rows.scale)
    raise ValueError(f"{form.name} is not quantised here")


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in ``dtype``, for inputs that are turned as its format says, rounded once."""
    form, values, scale, zero = packed
    numbers = values.float() if form.bits == 8 else _nibbles(values, signed=zero is None)
    if zero is None:
        return (numbers * _of_rows(scale.float())).to(dtype)
    groups = numbers.unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.float()[..., None] + zero.float()[..., None]).flatten(-2).to(dtype)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] itself."""
    if not packed.form.rotation:
        return unpack(packed, dtype)
    return rotate(unpack(packed, torch.float32), packed.form.rotation).to(dtype)


def rotate(x: Tensor, size: int) -> Tensor:
    """x [..., K] with each ``size`` channels turned by a symmetric orthogonal matrix, its own inverse; as it
    is for size 0."""
    if not size:
        return x
    matrix = hadamard(size).to(x.device, x.dtype)
    return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


@cache
def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix [size, size] of ConvRot (arXiv 2512.03673), a power of 4, normalised."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, four)
    if matrix.shape[0] != size:
        raise ValueError(f"the size of a regular Hadamard matrix is a power of 4, not {size}")
    return matrix / size**0.5


def pack_nibbles(numbers: Tensor) -> Tensor:
    """Integers [..., K] of 4 bits -> u8 [..., K / 2], the first of two in the low bits."""
    numbers = numbers.to(torch.uint8) & 15
    return numbers[..., 0::2] | (numbers[..., 1::2] << 4)


def _nibbles(values: Tensor, signed: bool) -> Tensor:
    values = values.view(torch.uint8)
    numbers = torch.stack([values & 15, values >> 4], dim=-1).flatten(-2).float()
    return numbers - 16 * (numbers > 7) if signed else numbers


def _rounded(numbers: Tensor, seed: int | None) -> Tensor:
    if seed is None:
        return numbers.round_()
    generator = torch.Generator(numbers.device).manual_seed(seed)
    chance = torch.rand(numbers.shape, generator=generator, device=numbers.device)
    return numbers.add_(chance).floor_()


def _of_rows(scale: Tensor) -> Tensor:
    return scale.reshape(-1, 1) if scale.numel() > 1 else scale


def _quantize_groups(wide: Tensor, form: LayerFormat, search: bool, seed: int | None) -> Packed:
    groups = wide.unflatten(-1, (-1, form.group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    largest = 2**form.bits - 1
    if search:
        numbers, scale, zero = _search_groups(groups, low, high, largest)
    else:
        numbers, scale, zero = _round_groups(groups, (high - low) / largest, low, largest, seed)
    numbers = numbers.flatten(-2)
    values = pack_nibbles(numbers) if form.bits == 4 else numbers.to(torch.uint8)
    return Packed(form, values, scale.squeeze(-1), zero.squeeze(-1))


def _round_groups(
    groups: Tensor, scale: Tensor, zero: Tensor, largest: int, seed: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers in fp32, and scale and zero point in bf16, which the numbers count with."""
    scale, zero = scale.bfloat16(), zero.bfloat16()
    numbers = _rounded((groups - zero.float()) / scale.float().clamp_min(_NOT_ZERO), seed)
    return numbers.clamp_(0, largest), scale, zero


def _search_groups(groups: Tensor, low: Tensor, high: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best of several ranges, each followed by lines of least squares through its numbers."""
    best: tuple[Tensor, ...] | None = None
    for part in _RANGES:
        scale, zero = (high - low) * (part / largest), (low + high) / 2 - (high - low) * (part / 2)
        for _ in range(_LINES + 1):
            numbers, *line = _round_groups(groups, scale, zero, largest)
            error = (numbers * line[0].float() + line[1].float() - groups).square().sum(-1, keepdim=True)
            found = numbers, *line, error
            if best is None:
                best = found
            better = error < best[-1]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
            scale, zero = _line(numbers, groups)
    assert best is not None
    return best[0], best[1], best[2]


def _line(numbers: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point with the least squared error for given numbers."""
    middle = numbers.mean(-1, keepdim=True)
    around = numbers - middle
    spread = around.square().sum(-1, keepdim=True).clamp_min(1)  # 0 where all numbers are the same
    scale = (around * groups).sum(-1, keepdim=True) / spread
    return scale, groups.mean(-1, keepdim=True) - scale * middle
