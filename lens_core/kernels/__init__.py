"""Fused operations: plain-PyTorch definitions, Triton where it can run, and the choice between them.

``eager`` and ``registry`` are the encoder's, ``block`` and ``block_registry`` the denoiser's, ``linear`` and
``linear_registry`` those of linears with quantised weights, ``strips`` and ``strip_registry`` the VAE's.
"""

from . import eager
from .bank import Bank, DenseMatrices, PackedMatrices
from .block import Inputs
from .block_registry import EAGER_BLOCK, BlockKernels, choose_block
from .linear import EAGER_LINEAR, LinearKernels
from .linear_registry import choose_linear
from .plan import AttentionPlan, Block
from .registry import Kernels, choose
from .strip_registry import EAGER_STRIPS, StripKernels, choose_strips

__all__ = [
    "EAGER_BLOCK",
    "EAGER_LINEAR",
    "EAGER_STRIPS",
    "AttentionPlan",
    "Bank",
    "Block",
    "BlockKernels",
    "DenseMatrices",
    "Inputs",
    "Kernels",
    "LinearKernels",
    "PackedMatrices",
    "StripKernels",
    "choose",
    "choose_block",
    "choose_linear",
    "choose_strips",
    "eager",
]
