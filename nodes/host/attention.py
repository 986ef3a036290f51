"""The attention that ComfyUI was started with, or that a node or the user put in its place."""

from __future__ import annotations

from typing import Any

from comfy.ldm.modules import attention as host
from torch import Tensor

from ...lens_core.ops import Attention, flash3_or_sdpa

# Values reach 1.4e5. Kernels that cast them to fp16 (SageAttention) overflow at 65,504; a power of two moves
# them into its range and back without any rounding.
_INTO_FP16 = 2.0**-8
# Where transformer_options keep the user's choice, one of ATTENTIONS; none is "auto".
ATTENTION = "lens_attention"
ATTENTIONS = ("auto", "host", "flash_attn3")


def host_attention(options: dict[str, Any]) -> Attention | None:
    """An ``optimized_attention_override`` in ``options``, else the user's choice there, else that of a start
    flag; None, our fastest, where ComfyUI would use PyTorch's."""
    if "optimized_attention_override" not in options:
        choice = options.get(ATTENTION, "auto")
        if choice == "flash_attn3":
            return flash3_or_sdpa
        if choice == "auto" and host.optimized_attention is host.attention_pytorch:
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
