"""One layer's experts as the kernels see them: two banks of matrices, packed or dense."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..quant import PackedFormat


class PackedMatrices(NamedTuple):
    """E matrices of N rows and K columns in 4 bits.

    ``blocks`` u8 [E, N, K / 32, 16], ``scales`` u8 [E, N, K / group], ``scale`` fp32 [E] or None,
    ``bias`` [E, N].
    """

    blocks: Tensor
    scales: Tensor
    scale: Tensor | None
    bias: Tensor
    format: PackedFormat


class DenseMatrices(NamedTuple):
    """The same, dequantised: ``weight`` [E, N, K], ``bias`` [E, N]."""

    weight: Tensor
    bias: Tensor


class Bank(NamedTuple):
    """gate_up has gate and up in alternate rows; SwiGLU's constants come along."""

    gate_up: PackedMatrices | DenseMatrices
    down: PackedMatrices | DenseMatrices
    alpha: float
    limit: float
