"""Linears over quantised weights: the definitions in plain PyTorch, and the one way through them.

A weight-only format is unpacked into the inputs' dtype and multiplied there, and so are comfy-kitchen's where
the GPU does not multiply them. Where the inputs are quantised too (W8A8), 8-bit numbers are multiplied and
each sum gets its row's and its column's scale. Streams come as a sequence, the image's first, each with a
layer of its own; these are alike in format and size, and have biases both or neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import kitchen
from ..quant import linear as quant
from ..quant.layer_format import FLOAT8, INT8, LayerFormat
from ..quant.linear import Packed, QuantizedRows, rotate
from .block import Inputs

Biases = Sequence[Tensor | None]


def _no_limit(form: LayerFormat, size: tuple[int, int]) -> str | None:
    return None


@dataclass(frozen=True)
class LinearKernels:
    """One backend's operations; signatures and meaning are those of the definitions.

    ``multiply`` has the kinds of 8-bit numbers that it multiplies; ``why_not`` gives the reason, in words,
    why a layer whose inputs are to be quantised is weight-only here, and may report it.
    """

    name: str
    quantize_rows: Callable[[Sequence[Tensor], str], list[QuantizedRows]]
    unpack: Callable[[Sequence[Packed], torch.dtype], list[Tensor]]
    multiply: dict[str, Callable[[Sequence[QuantizedRows], Sequence[Packed], Biases], list[Tensor]]]
    why_not: Callable[[LayerFormat, tuple[int, int]], str | None] = _no_limit

    def inputs_of(self, form: LayerFormat, size: tuple[int, int]) -> str | None:
        """What inputs of a layer of ``size`` (N, K) in ``form`` are quantised to here, if they are."""
        return None if form.inputs is None or self.why_not(form, size) is not None else form.inputs


def quantize_rows(streams: Sequence[Tensor], kind: str) -> list[QuantizedRows]:
    """``quant.linear.quantize_rows`` of each stream [B, T, K]."""
    return [quant.quantize_rows(x, kind) for x in streams]


def unpack(weights: Sequence[Packed], dtype: torch.dtype) -> list[Tensor]:
    """``quant.linear.unpack`` of each weight [N, K]."""
    return [quant.unpack(packed, dtype) for packed in weights]


def multiply(streams: Sequence[QuantizedRows], weights: Sequence[Packed], biases: Biases) -> list[Tensor]:
    """[B, T, N] in the rows' dtype of each stream [B, T, K] and its weight [N, K], in fp32 until the end."""
    return [_product(*layer) for layer in zip(streams, weights, biases, strict=True)]


def _product(x: QuantizedRows, packed: Packed, bias: Tensor | None) -> Tensor:
    out = F.linear(x.values.float(), packed.values.float()) * x.scale * packed.scale.float().reshape(-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear(x: Inputs, packed: Packed, bias: Tensor | None, kernels: LinearKernels) -> Tensor:
    """[B, T, N] of inputs [B, T, K]."""
    return linears([x], [packed], [bias], kernels)[0]


def linears(
    streams: Sequence[Inputs], weights: Sequence[Packed], biases: Biases, kernels: LinearKernels
) -> list[Tensor]:
    """[B, T, N] of each stream's inputs [B, T, K]; quantised ones are not turned by a rotation again."""
    if not _alike(streams, weights, biases):
        parts = zip(streams, weights, biases, strict=True)
        return [linear(x, packed, bias, kernels) for x, packed, bias in parts]
    form = weights[0].form
    whole = [x for x in streams if isinstance(x, Tensor)]
    if whole:
        if kitchen.multiplies(form, whole[0].device):
            return [
                kitchen.linear(x, packed, bias)
                for x, packed, bias in zip(whole, weights, biases, strict=True)
            ]
        whole = [rotate(x, form.rotation) for x in whole]
        kind = kernels.inputs_of(form, (weights[0].rows, whole[0].shape[-1]))
        if kind is None:
            return _weight_only(whole, kernels.unpack(weights, whole[0].dtype), biases)
        streams = kernels.quantize_rows(whole, kind)
    quantized = [x for x in streams if isinstance(x, QuantizedRows)]
    return kernels.multiply[form.inputs or ""](quantized, weights, biases)


def _alike(streams: Sequence[Inputs], weights: Sequence[Packed], biases: Biases) -> bool:
    if len(weights) == 1:
        return True
    first, second = weights
    return (
        first.form == second.form
        and first.values.shape == second.values.shape
        and first.scale.shape == second.scale.shape
        and isinstance(streams[0], Tensor) == isinstance(streams[1], Tensor)
        and (biases[0] is None) == (biases[1] is None)
    )


def aligned(x: Tensor) -> Tensor:
    """x as loads of 16 bytes need it: row by row, at a multiple of 16 bytes."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _weight_only(streams: Sequence[Tensor], weights: Sequence[Tensor], biases: Biases) -> list[Tensor]:
    return [
        F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        for x, weight, bias in zip(streams, weights, biases, strict=True)
    ]


EAGER_LINEAR = LinearKernels("torch", quantize_rows, unpack, {FLOAT8: multiply, INT8: multiply})
