"""The denoiser: text features, latents and noise level in, velocity out.

This is the plain-torch definition that faster paths are held to. Traps that the checkpoint sets:
values are not normalised and reach 1.4e5, the residual stream 3e7, so fp16 overflows (bf16 or fp32
only); text features reach 1e4 and are normalised before anything else sees them; the output norm
takes scale before shift, the opposite of FLUX.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DenoiserConfig
from ..ops import Attention, Operations, padding_mask, sdpa
from .block import LensBlock, modulate
from .rope import joint_positions, rotary_table


def round_sigma(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise level as the reference's model sees it: sigma * 1000 and back, in ``dtype``.

    In bf16 this moves sigma by up to 0.4 %, which shows in the picture, so it belongs to parity.
    """
    return (sigma * 1000).to(dtype) / 1000


def time_features(sigma: Tensor, channels: int) -> Tensor:
    """Sinusoidal features [B, channels] in fp32 of sigma [B]: cosines first, argument 1000 sigma."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
    angle = 1000 * sigma.float()[:, None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Two linears around a SiLU: [B, channels] -> [B, H]."""

    def __init__(self, channels: int, hidden: int, operations: Operations, **place: Any) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(channels, hidden, **place)
        self.linear_2 = operations.Linear(hidden, hidden, **place)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """Holds ``timestep_embedder`` under the checkpoint's name."""

    def __init__(self, config: DenoiserConfig, operations: Operations, **place: Any) -> None:
        super().__init__()
        channels, hidden = config.time_channels, config.hidden_size
        self.timestep_embedder = TimestepEmbedder(channels, hidden, operations, **place)


class OutputNorm(nn.Module):
    """LayerNorm without weights, then scale and shift from the time embedding (in that order)."""

    def __init__(self, config: DenoiserConfig, operations: Operations, **place: Any) -> None:
        super().__init__()
        self.linear = operations.Linear(config.hidden_size, 2 * config.hidden_size, **place)
        self.eps = config.norm_eps

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
        return modulate(F.layer_norm(x, x.shape[-1:], eps=self.eps), shift, scale)


class LensDenoiser(nn.Module):
    """Lens' dual-stream MMDiT. Parameter names are the published checkpoint's.

    Letters: B batch, S text tokens, N = h * w image tokens, L captured layers, H hidden size.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        operations: Operations = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        hidden, text = config.hidden_size, config.enc_hidden_dim
        self.img_in = operations.Linear(config.in_channels, hidden, **place)
        self.txt_norm = nn.ModuleList(
            operations.RMSNorm(text, eps=config.text_norm_eps, **place) for _ in range(config.num_text_layers)
        )
        self.txt_in = operations.Linear(text * config.num_text_layers, hidden, **place)
        self.time_text_embed = TimeTextEmbed(config, operations, **place)
        self.transformer_blocks = nn.ModuleList(
            LensBlock(config, operations, **place) for _ in range(config.num_layers)
        )
        self.norm_out = OutputNorm(config, operations, **place)
        self.proj_out = operations.Linear(hidden, config.in_channels, **place)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: Tensor,
        grid: tuple[int, int],
        text_real: Tensor | None = None,
        attention: Attention = sdpa,
    ) -> Tensor:
        """Velocity [B, N, C] of latents [B, N, C] at noise level sigma [B] in [0, 1].

        ``text`` is [B, S, L, text hidden], S = 0 for an empty prompt; ``grid`` is (h, w) with
        h * w = N; ``text_real`` [B, S] marks real tokens, None when all are (no mask is built).
        """
        img = self.img_in(latents)
        txt = self.embed_text(text)
        temb = self.embed_sigma(sigma, img.dtype)
        rotary = self.rotary(grid, txt.shape[1], img.device)
        mask = None if text_real is None else padding_mask(text_real, img.shape[1], img.dtype)
        for block in self.transformer_blocks:
            img, txt = block(img, txt, temb, rotary, mask, attention)
        return self.project_out(img, temb)

    def embed_text(self, text: Tensor) -> Tensor:
        """[B, S, L, text hidden] -> [B, S, H]."""
        if not text.shape[1]:
            return text.new_zeros(text.shape[0], 0, self.config.hidden_size)
        layers = text.unbind(2)
        normed = [norm(layer) for norm, layer in zip(self.txt_norm, layers, strict=True)]
        return self.txt_in(torch.cat(normed, dim=-1))

    def embed_sigma(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] -> time embedding [B, H], with the reference's rounding of sigma."""
        features = time_features(round_sigma(sigma, dtype), self.config.time_channels)
        return self.time_text_embed.timestep_embedder(features.to(dtype))

    def rotary(self, grid: tuple[int, int], text_length: int, device: torch.device) -> Tensor:
        """Rotation table [2, N + S, D / 2] of the joint sequence."""
        positions = joint_positions(*grid, text_length, device)
        table = rotary_table(positions, self.config.axes_dims_rope, self.config.rope_theta)
        return table.to(device)

    def project_out(self, img: Tensor, temb: Tensor) -> Tensor:
        """Image stream [B, N, H] -> velocity [B, N, C]."""
        return self.proj_out(self.norm_out(img, temb))
