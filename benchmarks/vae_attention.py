"""The attention of the VAE's middle, one head of 512 over all pixels, several ways: to choose from.

Few kernels take heads of 512, and none of the fast ones. Products of whole matrices run at a GPU's full
speed, and write the scores: a part of the queries at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Scores that exist at once.
SCORES = 2**27


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition in fp32, a part at a time; all [1, 1, N, C]."""
    wide = [part.float() for part in (query, key, value)]
    return by_products(*wide)


def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores in the operands' type, the softmax of which is computed in fp32."""
    count = max(1, SCORES // key.shape[2])
    turned = (key / math.sqrt(key.shape[3]))[0, 0].t()
    parts = [torch.softmax(part @ turned, -1) @ value[0, 0] for part in query[0, 0].split(count)]
    return torch.cat(parts)[None, None]


def by_products_wide(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores in fp32, which 16-bit products can give on NVIDIA's GPUs."""
    count = max(1, SCORES // key.shape[2])
    turned, scale = key[0, 0].t(), 1 / math.sqrt(key.shape[3])
    parts = []
    for part in query[0, 0].split(count):
        scores = torch.mm(part, turned, out_dtype=torch.float32)
        parts.append(torch.softmax(scores.mul_(scale), -1).to(value.dtype) @ value[0, 0])
    return torch.cat(parts)[None, None]


def fused(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PyTorch's own by one kernel."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(query, key, value)

    return run


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "as PyTorch chooses": F.scaled_dot_product_attention,
    "memory-efficient": fused(SDPBackend.EFFICIENT_ATTENTION),
    "cuDNN": fused(SDPBackend.CUDNN_ATTENTION),
    "flash": fused(SDPBackend.FLASH_ATTENTION),
    "products": by_products,
    "products, scores in fp32": by_products_wide,
}
