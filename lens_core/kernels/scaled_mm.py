"""Products of 8-bit floats by PyTorch, with a scale for each row and each column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..quant.linear import Packed, QuantizedRows
from .linear import Biases, aligned

# A weight's scale for each of its columns, and where the scale itself lay: for as long as that lives.
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
        aligned(x.values).view(-1, columns),
        aligned(packed.values).t(),
        scale_a=x.scale.reshape(-1, 1).contiguous(),
        scale_b=_column_scale(packed),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.view(*x.values.shape[:-1], -1)


def _column_scale(packed: Packed) -> Tensor:
    """fp32 [1, N]. Made once: a scale is not written over, a changed weight has another. One that moved is
    the same object elsewhere."""
    found, address = _columns.get(packed.scale, (None, 0))
    if found is None or address != packed.scale.data_ptr():
        # Memory of its own: a view would keep the scale, its key, alive.
        found = packed.scale.new_empty(1, packed.rows, dtype=torch.float32)
        found.copy_(packed.scale.reshape(1, -1))
        # What a CUDA graph makes while it is recorded is its own, and holds nothing before it is played.
        if not _is_recorded(packed.scale):
            _columns[packed.scale] = found, packed.scale.data_ptr()
    return found


def _is_recorded(like: Tensor) -> bool:
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def made_of(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What products read beside these weights' own memory: the scales it was made of, and itself."""
    scales = [(weight, _columns.get(weight)) for weight in weights]
    return [(scale.detach(), found[0]) for scale, found in scales if found is not None]
