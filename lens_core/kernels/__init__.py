"""The encoder's fused operations: plain-PyTorch definitions, Triton where it can run, and the choice."""

from . import eager
from .bank import Bank, DenseMatrices, PackedMatrices
from .plan import AttentionPlan, Block
from .registry import Kernels, choose

__all__ = ["AttentionPlan", "Bank", "Block", "DenseMatrices", "Kernels", "PackedMatrices", "choose", "eager"]
