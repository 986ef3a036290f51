"""The operations that model code is built from, and the attention it calls.

Modules take ``operations`` (``Linear``, ``RMSNorm``, ``Embedding``) from their caller and never
choose a dtype, a device or an offloading policy themselves: ComfyUI passes its own classes, the
command line passes ``torch.nn``. Attention is a plain callable for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import SettingError
from .kernels import flash3

# A namespace with Linear, RMSNorm and Embedding, constructed like torch.nn's.
Operations = Any


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors [N_i, ...] that lie one behind the other in memory, as one [sum N_i, ...]; else None."""
    first = tensors[0]
    rows, end = 0, first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or not tensor.is_contiguous():
            return None
        if tensor.dtype != first.dtype or tensor.shape[1:] != first.shape[1:]:
            return None
        rows, end = rows + len(tensor), end + tensor.nbytes
    inside = first.untyped_storage()
    if end > inside.data_ptr() + inside.nbytes():
        return None  # neighbours by chance, in memory of their own
    return first.as_strided((rows, *first.shape[1:]), first.stride())


class _CastingLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class CastingOperations:
    """torch.nn's layers, except that Linear casts its weight to its input's dtype as it runs.

    Weights so stay as stored on hardware where their dtype is slow or absent; in the same dtype nothing
    is cast.
    """

    Linear = _CastingLinear
    RMSNorm = nn.RMSNorm
    Embedding = nn.Embedding


class Attention(Protocol):
    """Softmax attention over q, k, v [B, heads, T, D] -> [B, T, heads * D].

    ``mask`` is None or an additive [B, 1, 1, T] in q's dtype.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's own attention, the definition that other backends are held to."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


# cuDNN's attention at Lens' sizes takes two thirds of the time of the one that PyTorch prefers, and with a
# mask a third (H200: 0.31, 0.47 and 0.48, 1.43 ms). Where cuDNN refuses, PyTorch takes the next by itself.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def cudnn_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """``sdpa`` by cuDNN where that can."""
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        return sdpa(q, k, v, mask)


@cache
def fastest_attention(device: torch.device) -> Attention:
    """PyTorch's attention with the backend that is fastest on ``device``."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.backends.cuda.cudnn_sdp_enabled():
        return sdpa
    # Hopper and data-centre Blackwell, where PyTorch's flash attention is still Ampere's.
    return cudnn_sdpa if torch.cuda.get_device_capability(device)[0] in (9, 10) else sdpa


def flash3_or_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """FlashAttention-3 for what it takes; PyTorch's attention under a mask or in another dtype."""
    if mask is None and q.dtype in flash3.DTYPES:
        return flash3.flash3(q, k, v)
    return fastest_attention(q.device)(q, k, v, mask)


def flash3_on(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    """``flash3_or_sdpa``; raises SettingError where FlashAttention-3 cannot run."""
    reason = flash3.why_not(device, dtype, head_dim, None)
    if reason is not None:
        raise SettingError(
            f"FlashAttention-3 cannot be used: {reason}. Set attention to auto, the fastest that is here."
        )
    return flash3_or_sdpa


def padding_mask(real: Tensor, before: int, dtype: torch.dtype) -> Tensor:
    """Additive key mask for ``before`` real keys followed by the keys of ``real`` [B, S] (True: real).

    Returns [B, 1, 1, before + S]. The lowest finite number rather than -inf: some attention
    backends turn -inf into NaN.
    """
    mask = torch.zeros(real.shape[0], before + real.shape[1], dtype=dtype, device=real.device)
    mask[:, before:].masked_fill_(~real.bool(), torch.finfo(dtype).min)
    return mask[:, None, None, :]
