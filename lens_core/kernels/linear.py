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

from ..quant import kitchen
from ..quant import linear as quant
from ..quant.layer_format import FLOAT8, INT8, LayerFormat
from ..quant.linear import Packed, QuantizedRows, rotate
from .block import Inputs


def _no_limit(form: LayerFormat, size: tuple[int, int]) -> str | None:
    return None


@dataclass(frozen=True)
class LinearKernels:
    """One backend's operations; signatures and meaning are those of the definitions.

    ``multiply`` has the kinds of 8-bit numbers that it multiplies; ``why_not`` gives the reason, in words,
    why a layer whose inputs are to be quantised is weight-only here, and may report it.
    """

    name: str
    quantize_rows: Callable[[Tensor, str], QuantizedRows]
    unpack: Callable[[Packed, torch.dtype], Tensor]
    multiply: dict[str, Callable[[QuantizedRows, Packed, Tensor | None], Tensor]]
    why_not: Callable[[LayerFormat, tuple[int, int]], str | None] = _no_limit

    def inputs_of(self, form: LayerFormat, size: tuple[int, int]) -> str | None:
        """The kind that inputs of a layer of ``size`` (N, K) in ``form`` are quantised to here, if they are."""
        return None if form.inputs is None or self.why_not(form, size) is not None else form.inputs


def multiply(x: QuantizedRows, packed: Packed, bias: Tensor | None) -> Tensor:
    """[B, T, N] in the rows' dtype of x [B, T, K] and a weight [N, K], in fp32 until the end."""
    out = F.linear(x.values.float(), packed.values.float()) * x.scale * packed.scale.float().reshape(-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear(x: Inputs, packed: Packed, bias: Tensor | None, kernels: LinearKernels) -> Tensor:
    """[B, T, N] of inputs [B, T, K]; those that are quantised already are not turned by a rotation again."""
    if isinstance(x, Tensor):
        if kitchen.has(packed.form):
            return kitchen.linear(x, packed, bias)
        x = rotate(x, packed.form.rotation)
        kind = kernels.inputs_of(packed.form, (packed.rows, x.shape[-1]))
        if kind is not None:
            x = kernels.quantize_rows(x, kind)
    if isinstance(x, QuantizedRows):
        return kernels.multiply[packed.form.inputs or ""](x, packed, bias)
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, kernels.unpack(packed, x.dtype), bias)


EAGER_LINEAR = LinearKernels("torch", quant.quantize_rows, quant.unpack, {FLOAT8: multiply, INT8: multiply})
