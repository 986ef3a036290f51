"""Quantised weights and rows of every kind, and what they mean, in fp64 and by other means than the
definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lens_core.quant.layer_format import AFFINE, LayerFormat, float8, int8, mxfp8, nvfp4
from lens_core.quant.linear import Packed, QuantizedRows, pack_nibbles

# Tokens of the image, or of image and text: as many, fewer and more, in whole tiles and not.
STREAMS = [(1,), (65,), (128,), (5, 3), (3, 5), (129, 1), (1, 129), (64, 64), (128, 256)]
LARGEST = {"int8": 127, "float8": 448}
E5M2 = LayerFormat("float8_e5m2", 8)
W4A4 = LayerFormat("convrot_w4a4", 4)
E4M3 = torch.float8_e4m3fn


def weights(rows: int, columns: int, group: int) -> dict[str, tuple[Packed, Tensor]]:
    """Random ones of every packing, and in fp64; ``group`` divides the columns and is even."""
    floats = torch.randn(rows, columns)
    bytes_ = torch.randint(-128, 128, (rows, columns))
    signed, unsigned = torch.randint(-8, 8, (rows, columns)), torch.randint(0, 16, (rows, columns))
    one, each = 0.1 + torch.rand(()), 0.1 + torch.rand(rows, 1)
    scales, zeros = 0.1 + torch.rand(rows, columns // group), torch.randn(rows, columns // group)
    found = {
        "e4m3": (Packed(float8, floats.to(torch.float8_e4m3fn), one), None),
        "e4m3 rows": (Packed(float8, floats.to(torch.float8_e4m3fn), each), None),
        "e5m2": (Packed(E5M2, floats.to(torch.float8_e5m2), one), None),
        "int8": (Packed(int8, bytes_.to(torch.int8), each), bytes_),
        "int8 one scale": (Packed(int8, bytes_.to(torch.int8), one), bytes_),
    }
    if columns % 2 == 0:
        nibbles = pack_nibbles(signed)
        found["w4a4"] = (Packed(W4A4, nibbles, each), signed)
        found["w4a4 as int8"] = (Packed(W4A4, nibbles.view(torch.int8), each.flatten()), signed)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        scale, zero = scales.to(dtype), zeros.to(dtype)
        eight, four = LayerFormat(AFFINE, 8, group), LayerFormat(AFFINE, 4, group)
        found[f"affine8 {name}"] = (Packed(eight, (bytes_ + 128).to(torch.uint8), scale, zero), bytes_ + 128)
        if columns % 2 == 0:
            found[f"affine4 {name}"] = (Packed(four, pack_nibbles(unsigned), scale, zero), unsigned)
    return {name: (packed, exact(packed, numbers)) for name, (packed, numbers) in found.items()}


def pairs(rows: int, columns: int, group: int) -> dict[str, list[tuple[Packed, Tensor]]]:
    """``weights`` of two streams: alike in packing and size, else not."""
    first, second = weights(rows, columns, group), weights(rows, columns, group)
    return {name: [held, second[name]] for name, held in first.items()}


def shifted(x: Tensor) -> Tensor:
    """The same numbers side by side, from an address on that is no multiple of 16 bytes."""
    moved = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert moved.data_ptr() % 16 and moved.is_contiguous()
    return moved


def spread(x: Tensor) -> Tensor:
    """The same numbers [..., K], no two of them side by side."""
    wide = x.new_empty(*x.shape, 3)
    return wide[..., 1].copy_(x)


def with_tensors(packed: Packed, place: Callable[[Tensor], Tensor]) -> Packed:
    """The weight with each of its tensors put elsewhere."""
    return Packed(packed.form, *(None if part is None else place(part) for part in packed[1:]))


class Layer(NamedTuple):
    """One stream, its weight and its bias."""

    x: QuantizedRows
    packed: Packed
    bias: Tensor | None


def layers(
    kind: str,
    tokens: Sequence[int],
    n: int,
    k: int,
    batch: int = 1,
    one_scale: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float16,
) -> list[Layer]:
    """Random streams [B, T, K] and a layer [N, K] of each, whose results are about one."""
    size = 1 / (73 * k**0.25)  # uniform numbers up to 127 have a spread of 73

    def numbers(*shape: int) -> Tensor:
        found = torch.randint(-127, 128, shape)
        return found.to(torch.int8 if kind == "int8" else torch.float8_e4m3fn)

    found = []
    for count in tokens:
        scale = size * (0.5 + (torch.rand(()) if one_scale else torch.rand(n, 1)))
        x = QuantizedRows(numbers(batch, count, k), size * (0.5 + torch.rand(batch, count, 1)), dtype)
        weight = Packed({"int8": int8, "float8": float8}[kind].dynamic(True), numbers(n, k), scale)
        found.append(Layer(x, weight, torch.randn(n) if bias else None))
    return found


def exact_product(x: QuantizedRows, packed: Packed, bias: Tensor | None) -> Tensor:
    """In fp64."""
    rows = x.values.double() * x.scale.double()
    scale = packed.scale.double().reshape(-1)
    out = rows @ packed.values.double().T * scale
    return out if bias is None else out + bias.double()


def block_scaled(rows: int, columns: int) -> dict[str, Packed]:
    """Random weights in mxfp8 and nvfp4, whose padding is NaN; 2^-7 and 2^7 are far apart for a scale."""
    packed = {}
    for form in (mxfp8, nvfp4):
        groups = columns // form.group
        scale = torch.full((-(-rows // 128) * 128, -(-groups // 4) * 4), 255, dtype=torch.uint8)
        if form is mxfp8:
            values = torch.randn(rows, columns).to(torch.float8_e4m3fn)
            scale[:rows, :groups] = torch.randint(120, 135, (rows, groups))
            factor = None
        else:
            values = torch.randint(0, 256, (rows, columns // 2)).to(torch.uint8)
            scale[:rows, :groups] = torch.randint(8, 0x7F, (rows, groups))
            factor = torch.tensor(0.37)
        scale = blocked(scale)
        packed[form.name] = Packed(form, values, scale if factor is None else scale.view(E4M3), factor)
    return packed


def blocked(scale: Tensor) -> Tensor:
    """Scales [R, C] put where cuBLAS wants each, one at a time by its formula."""
    row, group = torch.meshgrid(*(torch.arange(size) for size in scale.shape), indexing="ij")
    tile = row // 128 * (scale.shape[1] // 4) + group // 4
    at = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    return torch.empty_like(scale).view(-1).scatter_(0, at.view(-1), scale.view(-1)).view(scale.shape)


def exact(packed: Packed, numbers: Tensor | None) -> Tensor:
    """Numbers [N, K] times their scales plus their zero points, in fp64."""
    wide = (packed.values if numbers is None else numbers).double()
    scale = packed.scale.double()
    if packed.zero is None:
        return wide * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)
    repeats = wide.shape[1] // scale.shape[1]
    spread = [x.double().repeat_interleave(repeats, dim=1) for x in (scale, packed.zero)]
    return wide * spread[0] + spread[1]


def assert_nearest(rows: QuantizedRows, want: Tensor, kind: str, slack: float) -> None:
    """Rows are the nearest numbers of ``kind`` to fp64 ``want`` with the scale that this gives; ``slack`` is
    what was rounded before, relative to a row's largest."""
    top = want.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    assert rows.scale.dtype == torch.float32 and rows.values.shape == want.shape
    assert rows.scale.shape == (*want.shape[:-1], 1)
    assert ((rows.scale * LARGEST[kind] - top).abs() <= top * (slack + 1e-6)).all()
    step = rows.scale.double()
    error = (rows.values.double() * step - want).abs()
    # float8 has 3 bits behind the first, and its smallest number is 2^-9.
    half = step / 2 if kind == "int8" else torch.maximum(want.abs() / 16, step * 2**-10)
    # fp32 itself rounds a product by 2^-24 of the row's largest, which is where two numbers are as near.
    assert (error <= half * (1 + 1e-6) + top * (slack + 1e-6)).all()
