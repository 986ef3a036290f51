"""Fused operations: plain-PyTorch definitions, Triton where it can run, and the choice between them.

``eager`` and ``registry`` are the encoder's, ``block`` and ``block_registry`` the denoiser's.
"""

from . import eager
from .bank import Bank, DenseMatrices, PackedMatrices
from .block_registry import EAGER_BLOCK, BlockKernels, choose_block
from .plan import AttentionPlan, Block
from .registry import Kernels, choose

__all__ = [
    "EAGER_BLOCK",
    "AttentionPlan",
    "Bank",
    "Block",
    "BlockKernels",
    "DenseMatrices",
    "Kernels",
    "PackedMatrices",
    "choose",
    "choose_block",
    "eager",
]
