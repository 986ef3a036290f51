"""Sizes of the nano models; ``python -m tools.nano.configs`` counts their parameters.

Lens, Lens-Turbo and what both share have 12 MB together, so two denoisers leave 2 MB for the encoder and the
VAE. Everything that does not show in the pictures is small: the VAE's encoder is half its decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lens_core.config import DenoiserConfig, EncoderConfig
from lens_core.denoiser import LensDenoiser
from lens_core.encoder import GptOssEncoder
from lens_core.vae import LensVAE

BASE_RESOLUTION = 256
# At Lens' 5 so small a model draws things twice.
GUIDANCE = 2.0
# The latents' standard deviation. At 1 so simple pictures are decided at less noise than photographs are, and
# any schedule draws them; at 4 they are decided at more, where Lens' own schedule is finest.
LATENT_DEVIATION = 4.0
VAE: dict[str, Any] = {
    "block_out_channels": [8, 16, 16, 24],
    "decoder_block_out_channels": [16, 16, 32, 32],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": BASE_RESOLUTION,
}
DENOISER = DenoiserConfig(
    num_layers=4,
    num_attention_heads=2,
    in_channels=4 * VAE["latent_channels"],  # packed 2x2
    enc_hidden_dim=64,
)
VOCABULARY = 600


def encoder_config(vocabulary: int = VOCABULARY) -> EncoderConfig:
    """GPT-OSS with all 24 layers, so that the captured ones exist; everything else small."""
    return EncoderConfig(
        vocab_size=vocabulary,
        hidden_size=DENOISER.enc_hidden_dim,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=8,
    )


def modules() -> dict[str, nn.Module]:
    """The three models without memory."""
    with torch.device("meta"):
        vae = LensVAE(VAE)
    return {
        "denoiser": LensDenoiser(DENOISER, device="meta"),
        "encoder": GptOssEncoder(encoder_config(), device="meta"),
        "vae": vae,
    }


def main() -> None:
    """Print parameters and stored bytes: parameters in bf16, packed experts as they are."""
    for name, module in modules().items():
        count = sum(parameter.numel() for parameter in module.parameters())
        packed = sum(buffer.nbytes for buffer in module.buffers() if buffer.dtype == torch.uint8)
        print(f"{name:>10} {count:>11,} parameters, {2 * count + packed:>11,} bytes")


if __name__ == "__main__":
    main()
