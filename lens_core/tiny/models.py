"""Random weights of the three models, scaled so that activations stay in a realistic range."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DenoiserConfig, EncoderConfig
from ..denoiser import LensDenoiser
from ..encoder import GptOssEncoder
from ..quant.mxfp4 import quantize
from ..quant.policy import is_quantized
from ..quantized import linear_sizes
from ..vae import LensVAE

DENOISER = DenoiserConfig(num_layers=3, num_attention_heads=2, enc_hidden_dim=64)
_LORA_RANK = 4
LORA_METADATA = {"lora_alpha": "2"}
VAE: dict[str, Any] = {
    "block_out_channels": [32, 32, 32, 32],
    "layers_per_block": 1,
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 64,
}


def encoder_config(vocabulary: int) -> EncoderConfig:
    """24 layers, so that the captured ones exist; everything else small."""
    return EncoderConfig(
        vocab_size=vocabulary,
        hidden_size=DENOISER.enc_hidden_dim,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
    )


def denoiser_weights(generator: torch.Generator, config: DenoiserConfig = DENOISER) -> dict[str, Tensor]:
    """fp32 tensors under the checkpoint's names."""
    return random_weights(LensDenoiser(config, device="meta"), generator)


def encoder_weights(config: EncoderConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """fp32 tensors under Hugging Face's names, experts dense [E, rows, columns], with norm and lm_head."""
    module = GptOssEncoder(config, device="meta")
    weights = {f"model.{name}": value for name, value in random_weights(module, generator).items()}
    for layer in range(config.num_hidden_layers):
        experts = f"model.layers.{layer}.mlp.experts"
        hidden, inner = config.hidden_size, config.intermediate_size
        for name, rows, columns in (
            ("gate_up_proj", 2 * inner, hidden),
            ("down_proj", hidden, inner),
        ):
            shape = (config.num_local_experts, rows, columns)
            weights[f"{experts}.{name}"] = torch.randn(shape, generator=generator) / math.sqrt(columns)
    weights["model.norm.weight"] = torch.ones(config.hidden_size)
    head = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    weights["lm_head.weight"] = head / math.sqrt(config.hidden_size)
    return weights


def packed_encoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's tensors as published: dense experts [E, rows, columns] in MXFP4, the rest in bf16."""
    packed = {}
    for name, value in weights.items():
        if name.endswith((".gate_up_proj", ".down_proj")):
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = quantize(value)
        else:
            packed[name] = value.bfloat16()
    return dict(sorted(packed.items()))


def vae_weights(generator: torch.Generator, config: dict[str, Any] = VAE) -> dict[str, Tensor]:
    """fp32 tensors under diffusers' names, with plausible batch-norm statistics."""
    with torch.device("meta"):
        module = LensVAE(config).model
    weights = random_weights(module, generator)
    channels = 4 * config["latent_channels"]
    weights["bn.running_mean"] = 0.1 * torch.randn(channels, generator=generator)
    weights["bn.running_var"] = 1 + torch.rand(channels, generator=generator)
    weights["bn.num_batches_tracked"] = torch.tensor(1000)
    return dict(sorted(weights.items()))


def lora_weights(generator: torch.Generator, config: DenoiserConfig = DENOISER) -> dict[str, Tensor]:
    """A LoRA for the denoiser's attention and MLPs, under PEFT's names; alpha is in ``LORA_METADATA``."""
    weights = {}
    for name, (rows, columns) in linear_sizes(LensDenoiser(config, device="meta")).items():
        if is_quantized(name):  # the layers that trainers choose too
            down = torch.randn(_LORA_RANK, columns, generator=generator) / math.sqrt(columns)
            weights[f"{name}.lora_A.weight"] = down
            weights[f"{name}.lora_B.weight"] = torch.randn(rows, _LORA_RANK, generator=generator) / 4
    return weights


def random_weights(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Norms near 1, biases small, matrices with variance 1 / inputs; in the order of the names."""
    weights = {}
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, device=generator.device)
        if parameter.ndim == 1 and name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        elif parameter.ndim == 1 or name.endswith("bias"):
            weights[name] = 0.1 * noise
        else:
            weights[name] = noise / math.sqrt(parameter[0].numel())
    return weights
