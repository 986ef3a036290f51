"""The attention that ComfyUI was started with, or that a node put in its place."""

from __future__ import annotations

from typing import Any

from comfy.ldm.modules import attention as host
from torch import Tensor

from ...lens_core.ops import Attention

# Values reach 1.4e5. Kernels that cast them to fp16 (SageAttention) overflow at 65,504; a power of two moves
# them into its range and back without any rounding.
_INTO_FP16 = 2.0**-8


def host_attention(options: dict[str, Any]) -> Attention | None:
    """None, our fastest, where ComfyUI would use PyTorch's; else the one chosen by a start flag or by an
    ``optimized_attention_override`` in ``options``."""
    if "optimized_attention_override" not in options and host.optimized_attention is host.attention_pytorch:
        return None

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = host.optimized_attention(
            q,
            k,
            v * _INTO_FP16,
            q.shape[1],
            mask=mask,
            skip_reshape=True,
            transformer_options=options,
        )
        return out * (1 / _INTO_FP16)

    return attention
