"""Full-size random checkpoints, written once: time, memory and rounding do not depend on training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.encoder import random_mxfp4
from lens_core.config import DenoiserConfig, EncoderConfig
from lens_core.denoiser import LensDenoiser
from lens_core.tiny.models import random_weights
from lens_core.vae import LensVAE


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
    save_file(
        random_mxfp4(EncoderConfig(), generator), models / "text_encoders" / "gpt_oss_20b_mxfp4.safetensors"
    )
    with torch.device("meta"):
        vae = LensVAE({}).model
    weights = {name: value.cpu() for name, value in random_weights(vae, generator).items()}
    weights["bn.running_mean"], weights["bn.running_var"] = torch.zeros(128), torch.ones(128)
    save_file(weights, models / "vae" / "flux2-vae.safetensors")
    torch.cuda.empty_cache()
    return models
