"""Full-size random checkpoints, written once: time, memory and rounding do not depend on training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

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


@pytest.fixture(scope="session")
def comfy() -> SimpleNamespace:
    """ComfyUI's memory manager and patcher, and what makes the pack's CLIPs, MODELs, VAEs and pictures."""
    from benchmarks.picture import pack

    host = pack()
    import comfy.model_management
    import comfy.model_patcher

    return SimpleNamespace(
        management=comfy.model_management,
        patcher=comfy.model_patcher.ModelPatcher,
        load_clip=host.clip.load_clip,
        load_model=host.model.load_model,
        load_vae=host.vae.load_host_vae,
        empty_latent=host.sampling.empty_latent,
        sample=host.sampling.sample,
        decode=host.sampling.decode,
    )


def allocated() -> int:
    """Bytes on the GPU now."""
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()
