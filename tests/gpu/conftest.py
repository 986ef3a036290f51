"""Full-size random checkpoints, written once: time, memory and rounding do not depend on training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lens_core.config import DenoiserConfig, EncoderConfig
from lens_core.denoiser import LensDenoiser
from lens_core.encoder import GptOssEncoder
from lens_core.tiny.models import random_weights
from lens_core.tiny.tokenizer import tiny_tokenizer
from lens_core.vae import LensVAE

# Random MXFP4 bytes have a mean square of 8.56; these two exponents give about 1 / sqrt(2880).
_SCALE_BYTES = (119, 121)


@pytest.fixture(scope="session")
def generator() -> torch.Generator:
    """One stream of random numbers on the GPU."""
    return torch.Generator("cuda").manual_seed(0)


@pytest.fixture(scope="session")
def full_models(tmp_path_factory: pytest.TempPathFactory, generator: torch.Generator) -> Path:
    """A ComfyUI models folder: denoiser in bf16, encoder in MXFP4, VAE."""
    models = tmp_path_factory.mktemp("full_models")
    for kind in ("diffusion_models", "text_encoders", "vae"):
        (models / kind).mkdir()
    denoiser = random_weights(LensDenoiser(DenoiserConfig(), device="meta"), generator)
    single = {name: value.bfloat16().cpu() for name, value in denoiser.items()}
    save_file(single, models / "diffusion_models" / "lens_turbo_bf16.safetensors")
    del denoiser, single
    save_file(_encoder(generator), models / "text_encoders" / "gpt_oss_20b_mxfp4.safetensors")
    with torch.device("meta"):
        vae = LensVAE({}).model
    weights = {name: value.cpu() for name, value in random_weights(vae, generator).items()}
    weights["bn.running_mean"], weights["bn.running_var"] = torch.zeros(128), torch.ones(128)
    save_file(weights, models / "vae" / "flux2-vae.safetensors")
    torch.cuda.empty_cache()
    return models


def _encoder(generator: torch.Generator) -> dict[str, torch.Tensor]:
    config = EncoderConfig()
    tensors = {}
    for name, like in GptOssEncoder(config, device="meta").state_dict().items():
        if name.endswith("_blocks"):
            low, high, kind = 0, 256, torch.uint8
        elif name.endswith("_scales"):
            low, high, kind = *_SCALE_BYTES, torch.uint8
        else:
            noise = torch.randn(like.shape, generator=generator, device="cuda")
            is_norm = name.endswith("layernorm.weight")
            scale = 0.1 if like.ndim == 1 or name.endswith("bias") else 1 / math.sqrt(like.shape[-1])
            tensors[f"model.{name}"] = (is_norm + scale * noise).bfloat16().cpu()
            continue
        random = torch.randint(low, high, like.shape, generator=generator, device="cuda", dtype=kind)
        tensors[f"model.{name}"] = random.cpu()
    text = tiny_tokenizer().to_str().encode()
    tensors["tokenizer_json"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors
