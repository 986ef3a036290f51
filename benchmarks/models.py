"""Full-size random checkpoints: time, memory and rounding do not depend on training."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.denoiser import DEVICE, load
from benchmarks.encoder import CONFIG, random_mxfp4
from lens_core.tiny.models import random_weights
from lens_core.vae import LensVAE

ENCODER, VAE = "gpt_oss_20b_mxfp4.safetensors", "flux2-vae.safetensors"


def write_models(
    denoisers: Path, encoders: Path, vaes: Path, denoiser: str = "lens_bf16.safetensors"
) -> None:
    """Denoiser in bf16, encoder in MXFP4, VAE in fp32, each in a folder."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    state = load(generator).state_dict()
    save_file({name: value.cpu() for name, value in state.items()}, denoisers / denoiser)
    save_file(random_mxfp4(CONFIG, generator), encoders / ENCODER)
    with torch.device("meta"):
        vae = LensVAE({}).model
    weights = {name: value.cpu() for name, value in random_weights(vae, generator).items()}
    weights |= {"bn.running_mean": torch.zeros(128), "bn.running_var": torch.ones(128)}
    save_file(weights, vaes / VAE)
    torch.cuda.empty_cache()
