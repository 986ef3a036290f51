"""One of the 48 blocks: joint attention and SwiGLU on an image and a text stream, each modulated
by the time embedding.

Module names are the checkpoint's own (LoRA files address them): ``img_mod.1`` is the linear behind
a SiLU, ``attn.to_out.0`` sits in a list. An empty text stream (S = 0) costs nothing: no text layer
runs, which is how the unconditional pass of an empty negative prompt is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DenoiserConfig
from ..ops import Attention, Operations
from .rope import apply_rotary

Modulation = tuple[Tensor, Tensor, Tensor]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive norm's affine part: x [B, T, H], shift and scale [B, 1, H]."""
    return x * (1 + scale) + shift


def split_modulation(table: Tensor) -> tuple[Modulation, Modulation]:
    """[B, 6 H] -> (shift, scale, gate) of attention and of the MLP, each [B, 1, H]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = table.unsqueeze(1).chunk(6, dim=-1)
    return (shift1, scale1, gate1), (shift2, scale2, gate2)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases."""

    def __init__(self, hidden: int, inner: int, operations: Operations, **place: Any) -> None:
        super().__init__()
        self.w1 = operations.Linear(hidden, inner, bias=False, **place)
        self.w2 = operations.Linear(inner, hidden, bias=False, **place)
        self.w3 = operations.Linear(hidden, inner, bias=False, **place)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class JointAttention(nn.Module):
    """Attention over image and text tokens together, image first, with a QKV projection a stream."""

    def __init__(self, config: DenoiserConfig, operations: Operations, **place: Any) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.attention_head_dim
        self.head_dim = dim
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (
            operations.RMSNorm(dim, eps=config.qk_norm_eps, **place) for _ in range(4)
        )
        self.img_qkv = operations.Linear(hidden, 3 * hidden, **place)
        self.txt_qkv = operations.Linear(hidden, 3 * hidden, **place)
        self.to_out = nn.ModuleList([operations.Linear(hidden, hidden, **place)])
        self.to_add_out = operations.Linear(hidden, hidden, **place)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """[B, T, 3 H] -> q, k, v, each [B, T, heads, D]."""
        return qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(-3)

    def forward(
        self, img: Tensor, txt: Tensor, rotary: Tensor, mask: Tensor | None, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        """img [B, N, H], txt [B, S, H], rotary [2, N + S, D / 2] -> the same two shapes."""
        q, k, v = self._heads(self.img_qkv(img))
        q, k = self.norm_q(q), self.norm_k(k)
        if txt.shape[1]:
            txt_q, txt_k, txt_v = self._heads(self.txt_qkv(txt))
            q = torch.cat([q, self.norm_added_q(txt_q)], dim=1)
            k = torch.cat([k, self.norm_added_k(txt_k)], dim=1)
            v = torch.cat([v, txt_v], dim=1)
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        img_out, txt_out = out.split([img.shape[1], txt.shape[1]], dim=1)
        return self.to_out[0](img_out), self.to_add_out(txt_out) if txt.shape[1] else txt


class LensBlock(nn.Module):
    """Modulated joint attention, then a modulated SwiGLU, on both streams."""

    def __init__(self, config: DenoiserConfig, operations: Operations, **place: Any) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.mlp_hidden_size
        self.attn = JointAttention(config, operations, **place)
        self.img_mod, self.txt_mod = (
            nn.Sequential(nn.SiLU(), operations.Linear(hidden, 6 * hidden, **place)) for _ in range(2)
        )
        self.img_norm1, self.img_norm2, self.txt_norm1, self.txt_norm2 = (
            operations.RMSNorm(hidden, eps=config.norm_eps, **place) for _ in range(4)
        )
        self.img_mlp, self.txt_mlp = (SwiGLU(hidden, inner, operations, **place) for _ in range(2))

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        temb: Tensor,
        rotary: Tensor,
        mask: Tensor | None,
        attention: Attention,
    ) -> tuple[Tensor, Tensor]:
        """img [B, N, H], txt [B, S, H], temb [B, H] -> the two streams after this block."""
        (shift, scale, gate), img_mlp = split_modulation(self.img_mod(temb))
        img_in = modulate(self.img_norm1(img), shift, scale)
        if not txt.shape[1]:
            img_attn, _ = self.attn(img_in, txt, rotary, mask, attention)
            return self._mlp(img + gate * img_attn, self.img_norm2, self.img_mlp, img_mlp), txt

        (shift, scale, txt_gate), txt_mlp = split_modulation(self.txt_mod(temb))
        txt_in = modulate(self.txt_norm1(txt), shift, scale)
        img_attn, txt_attn = self.attn(img_in, txt_in, rotary, mask, attention)
        img = self._mlp(img + gate * img_attn, self.img_norm2, self.img_mlp, img_mlp)
        txt = self._mlp(txt + txt_gate * txt_attn, self.txt_norm2, self.txt_mlp, txt_mlp)
        return img, txt

    @staticmethod
    def _mlp(x: Tensor, norm: nn.Module, mlp: nn.Module, modulation: Modulation) -> Tensor:
        shift, scale, gate = modulation
        return x + gate * mlp(modulate(norm(x), shift, scale))
