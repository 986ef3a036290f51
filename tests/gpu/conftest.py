"""Full-size random checkpoints, written once: time, memory and rounding do not depend on training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.models import write_models


@pytest.fixture(scope="session")
def generator() -> torch.Generator:
    """One stream of random numbers on the GPU."""
    return torch.Generator("cuda").manual_seed(0)


@pytest.fixture(scope="session")
def full_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI models folder: denoiser in bf16, encoder in MXFP4, VAE."""
    models = tmp_path_factory.mktemp("full_models")
    folders = [models / kind for kind in ("diffusion_models", "text_encoders", "vae")]
    for folder in folders:
        folder.mkdir()
    write_models(*folders, "lens_turbo_bf16.safetensors")
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
