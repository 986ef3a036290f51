"""Linears over quantised weights: the definitions in plain PyTorch, and the one way through them.

A weight-only format is unpacked into the inputs' dtype and multiplied there. Where the inputs are quantised
too (W8A8), 8-bit numbers are multiplied and each sum gets its row's and its column's scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import linear as quant
from ..quant.layer_format import FLOAT8, INT8, LayerFormat
from ..quant.linear import Packed, QuantizedRows, rotate
from .block import Inputs


@dataclass(frozen=True)
class LinearKernels:
    """One backend's operations; signatures and meaning are those of the definitions.

    ``multiply`` has the kinds of 8-bit numbers that it multiplies; the others are weight-only.
    """

    name: str
    quantize_rows: Callable[[Tensor, str], QuantizedRows]
    unpack: Callable[[Packed, torch.dtype], Tensor]
    multiply: dict[str, Callable[[QuantizedRows, Packed, Tensor | None], Tensor]]

    def inputs_of(self, form: LayerFormat) -> str | None:
        """The kind that inputs of a layer in ``form`` are quantised to here, if they are."""
        return form.inputs if form.inputs in self.multiply else None


def multiply(x: QuantizedRows, packed: Packed, bias: Tensor | None) -> Tensor:
    """[B, T, N] in the rows' dtype of x [B, T, K] and a weight [N, K], in fp32 until the end."""
    out = F.linear(x.values.float(), packed.values.float()) * x.scale * packed.scale.float().reshape(-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear(x: Inputs, packed: Packed, bias: Tensor | None, kernels: LinearKernels) -> Tensor:
    """[B, T, N] of inputs [B, T, K]; those that are quantised already are not turned by a rotation again."""
    if isinstance(x, Tensor):
        x = rotate(x, packed.form.rotation)
        kind = kernels.inputs_of(packed.form)
        if kind is not None:
            x = kernels.quantize_rows(x, kind)
    if isinstance(x, QuantizedRows):
        return kernels.multiply[packed.form.inputs or ""](x, packed, bias)
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, kernels.unpack(packed, x.dtype), bias)


EAGER_LINEAR = LinearKernels("torch", quant.quantize_rows, quant.unpack, {FLOAT8: multiply, INT8: multiply})
