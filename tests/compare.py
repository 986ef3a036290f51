"""How tests compare tensors: relative L2, over everything or token by token."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_l2(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in fp64."""
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def per_token_l2(got: Tensor, want: Tensor) -> Tensor:
    """Relative L2 over the last dimension, [...]."""
    got, want = got.double(), want.double()
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


def cosine(got: Tensor, want: Tensor) -> Tensor:
    """Cosine over the last dimension, [...]."""
    return torch.cosine_similarity(got.double(), want.double(), dim=-1)
