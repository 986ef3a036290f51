"""FLUX.2's VAE behind the latents that Lens samples.

diffusers' ``AutoencoderKLFlux2`` has the layers; this module adds what lies between it and
the denoiser: 2x2 packing of 32 channels into 128 and the batch norm over the packed channels, so
that callers never see either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingPackage
from ..kernels import EAGER_STRIPS, choose_strips
from . import encode_strips, frugal, strips


def pack(latents: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> [B, 4C, h, w]; packed channel order is (channel, row, column)."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, 4 * channels, height // 2, width // 2)


def unpack(latents: Tensor) -> Tensor:
    """[B, 4C, h, w] -> [B, C, 2h, 2w]; the inverse of ``pack``."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels // 4, 2, 2, height, width)
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // 4, 2 * height, 2 * width)


def _nothing() -> None:
    pass


class LensVAE(nn.Module):
    """Packed, normalised latents [B, C, h, w] to pictures [B, 3, 16h, 16w] in [-1, 1] and back; FLUX.2's VAE
    has C = 128."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        # Here and not above: importing diffusers takes seconds, which a server's start should not.
        try:
            from diffusers import AutoencoderKLFlux2
        except ImportError as error:
            raise MissingPackage(
                "FLUX.2's VAE needs diffusers 0.38 or newer: pip install 'diffusers>=0.38'."
            ) from error
        self.model = AutoencoderKLFlux2.from_config(config)
        self.on_strip = _nothing

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        bn = self.model.bn
        deviation = torch.sqrt(bn.running_var.float() + bn.eps)
        return tuple(  # type: ignore[return-value]
            value.view(1, -1, 1, 1).to(like) for value in (bn.running_mean, deviation)
        )

    def decode(self, latents: Tensor, frugal_memory: bool = False) -> Tensor:
        """Pictures of packed latents, not clamped; calls ``on_strip`` often, which may raise.

        ``frugal_memory``: in two thirds of the memory, for two fifths more work.
        """
        mean, deviation = self._statistics(latents)
        finest = frugal.finest if frugal_memory else None
        return strips.decode(self.model, unpack(latents * deviation + mean), self.on_strip, finest)

    def decode_whole(self, latents: Tensor) -> Tensor:
        """``decode`` by diffusers' own, whole tensors at a time: the definition that strips are held to."""
        mean, deviation = self._statistics(latents)
        return self.model.decode(unpack(latents * deviation + mean), return_dict=False)[0]

    def decode_bytes(
        self,
        height: int,
        width: int,
        element_size: int,
        device: torch.device | None = None,
        frugal_memory: bool = False,
    ) -> int:
        """Peak memory of decoding one picture of height x width tokens, weights left out.

        ``device``: where it will be decoded, if that is not where the weights are.
        """
        config = self.model.config
        channels = config.decoder_block_out_channels or config.block_out_channels
        way = frugal if frugal_memory else strips
        return way.decode_bytes(channels, height, width, element_size, self._fused(device))

    def encode_bytes(
        self, height: int, width: int, element_size: int, device: torch.device | None = None
    ) -> int:
        """Peak memory of encoding one picture of height x width tokens; see ``decode_bytes``."""
        channels = self.model.config.block_out_channels
        return encode_strips.encode_bytes(channels, height, width, element_size, self._fused(device))

    def _fused(self, device: torch.device | None) -> bool:
        weight = next(self.parameters())
        return choose_strips(device or weight.device, weight.dtype) is not EAGER_STRIPS

    def encode(self, images: Tensor) -> Tensor:
        """Packed latents of pictures: the posterior's mean, normalised; calls ``on_strip`` often, which may
        raise."""
        return self._normalised(encode_strips.encode(self.model, images, self.on_strip))

    def encode_whole(self, images: Tensor) -> Tensor:
        """``encode`` by diffusers' own, whole tensors at a time: the definition that strips are held to."""
        return self._normalised(self.model.encode(images, return_dict=False)[0].mode())

    def _normalised(self, means: Tensor) -> Tensor:
        packed = pack(means)
        mean, deviation = self._statistics(packed)
        return (packed - mean) / deviation


def to_uint8(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, H, W, 3] bytes; truncated, as the reference does."""
    return ((images.clamp(-1, 1).float() + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1)
