"""Products of 8-bit floats by PyTorch, with a scale for each row and each column."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.linear import Packed, QuantizedRows


def why_not_multiply_float8(rows: int, columns: int) -> str | None:
    """The limit that a weight [rows, columns] does not meet, in words."""
    if rows % 16 or columns % 16:
        return f"a layer has {columns} inputs and {rows} outputs, no multiples of 16"
    return None


def multiply_float8(x: QuantizedRows, packed: Packed, bias: Tensor | None) -> Tensor:
    """[..., N] in bf16 of float8 x [..., K] and a weight that ``why_not_multiply_float8`` lets pass.

    ``use_fast_accum`` leaves the sums to the matrix units, which keep fewer bits than fp32, but far more
    than the factors have.
    """
    scale = packed.scale.float().reshape(1, -1).expand(1, packed.rows).contiguous()
    out = torch._scaled_mm(
        x.values.flatten(0, -2).contiguous(),
        packed.values.contiguous().t(),
        scale_a=x.scale.reshape(-1, 1).contiguous(),
        scale_b=scale,
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.unflatten(0, x.shape[:-1])
