"""Products of 8-bit floats by PyTorch, with a scale for each row and each column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..quant.linear import Packed, QuantizedRows
from .linear import Biases

# A weight's scale for each of its columns, for as long as the weight's own scale lives.
_columns = WeakTensorKeyDictionary()


def why_not_multiply_float8(rows: int, columns: int) -> str | None:
    """The limit that a weight [rows, columns] does not meet, in words."""
    if rows % 16 or columns % 16:
        return f"a layer has {columns} inputs and {rows} outputs, no multiples of 16"
    return None


def multiply_float8(
    streams: Sequence[QuantizedRows], weights: Sequence[Packed], biases: Biases
) -> list[Tensor]:
    """[B, T, N] in bf16 of float8 streams [B, T, K] and weights that ``why_not_multiply_float8`` lets pass.

    ``use_fast_accum`` leaves the sums to the matrix units, which keep fewer bits than fp32, but far more
    than the factors have.
    """
    return [_product(*layer) for layer in zip(streams, weights, biases, strict=True)]


def _product(x: QuantizedRows, packed: Packed, bias: Tensor | None) -> Tensor:
    columns = packed.values.shape[1]
    out = torch._scaled_mm(
        x.values.view(-1, columns),
        packed.values.t(),
        scale_a=x.scale.view(-1, 1),
        scale_b=_column_scale(packed),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.view(*x.values.shape[:-1], -1)


def _column_scale(packed: Packed) -> Tensor:
    """fp32 [1, N]. Made once: a scale is not written over, a changed weight has another."""
    found = _columns.get(packed.scale)
    if found is None:
        found = packed.scale.float().reshape(1, -1).expand(1, packed.rows).contiguous()
        _columns[packed.scale] = found
    return found
