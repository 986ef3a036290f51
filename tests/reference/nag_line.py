"""The denoiser with normalised attention guidance (arXiv 2505.21179), in the manner of ``straight_line``: one
picture, three streams, nothing shared with ``lens_core``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .straight_line import HEAD, Model, Weights, denoiser_rope, linear, rms_norm


def limited(wanted: Tensor, unwanted: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """The paper's formulas, token by token, in float64."""
    out = torch.empty_like(wanted, dtype=torch.float64)
    for i, (p, n) in enumerate(zip(wanted.double(), unwanted.double(), strict=True)):
        moved = p + scale * (p - n)
        ratio = moved.abs().sum() / p.abs().sum()
        out[i] = alpha * (moved * min(ratio, tau) / ratio) + (1 - alpha) * p
    return out.to(wanted.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """[T, heads, 64] each -> [T, heads * 64]."""
    cos, sin = rope

    def rotate(y: Tensor) -> Tensor:
        a, b = y[..., 0::2], y[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    scores = torch.einsum("qhc,khc->hqk", rotate(q), rotate(k)) / math.sqrt(HEAD)
    return torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).flatten(1)


def block(
    weights: Weights, at: str, image: Tensor, texts: list[Tensor], temb: Tensor, size: tuple, settings: tuple
) -> tuple[Tensor, list[Tensor]]:
    """One block: the image and, in ``texts``, the wanted and the unwanted prompt's stream."""
    w = {name.removeprefix(at): tensor for name, tensor in weights.items() if name.startswith(at)}

    def heads(x: Tensor, s: str, added: str) -> list[Tensor]:
        shift, scale = linear(w, s + "_mod.1", F.silu(temb)).chunk(6)[:2]
        y = rms_norm(x, w[s + "_norm1.weight"], 1e-6) * (1 + scale) + shift
        q, k, v = linear(w, f"attn.{s}_qkv", y).view(len(x), 3, temb.shape[-1] // HEAD, HEAD).unbind(1)
        q = rms_norm(q, w[f"attn.norm_{added}q.weight"], 1e-6)
        return [q, rms_norm(k, w[f"attn.norm_{added}k.weight"], 1e-6), v]

    def after(x: Tensor, s: str, out: str, attended: Tensor) -> Tensor:
        attention_gate, shift, scale, gate = linear(w, s + "_mod.1", F.silu(temb)).chunk(6)[2:]
        x = x + attention_gate * linear(w, out, attended)
        y = rms_norm(x, w[s + "_norm2.weight"], 1e-6) * (1 + scale) + shift
        y = F.silu(F.linear(y, w[s + "_mlp.w1.weight"])) * F.linear(y, w[s + "_mlp.w3.weight"])
        return x + gate * F.linear(y, w[s + "_mlp.w2.weight"])

    own, seen, following = heads(image, "img", ""), [], []
    for text in texts:
        parts = zip(own, heads(text, "txt", "added_"), strict=True)
        out = attention(*(torch.cat(pair) for pair in parts), denoiser_rope(*size, len(text)))
        seen.append(out[: len(image)])
        following.append(after(text, "txt", "attn.to_add_out", out[len(image) :]))
    return after(image, "img", "attn.to_out.0", limited(*seen, *settings)), following


@torch.no_grad()
def velocity(
    model: Model,
    x: Tensor,
    features: list[list[Tensor]],
    sigma: float,
    size: tuple[int, int],
    settings: tuple[float, float, float],
) -> Tensor:
    """Velocity [N, 128] of latents [N, 128]; features of both prompts; settings are scale, tau and alpha."""
    weights, image, texts = model["denoiser"], linear(model["denoiser"], "img_in", x), []
    for prompt in features:
        normed = [rms_norm(f, weights[f"txt_norm.{i}.weight"], 1e-5) for i, f in enumerate(prompt)]
        texts.append(linear(weights, "txt_in", torch.cat(normed, -1)))
    angle = 1000 * sigma * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    at = "time_text_embed.timestep_embedder.linear_"
    temb = linear(weights, at + "1", torch.cat([angle.cos(), angle.sin()]).float())
    temb = linear(weights, at + "2", F.silu(temb))
    for i in range(len({name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")})):
        image, texts = block(weights, f"transformer_blocks.{i}.", image, texts, temb, size, settings)
    scale, shift = linear(weights, "norm_out.linear", F.silu(temb)).chunk(2)
    y = F.layer_norm(image, image.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return linear(weights, "proj_out", y)
