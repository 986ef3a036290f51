"""Folders as the libraries write them that published ones come from: diffusers, huggingface_hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lens_core.loading import load_denoiser, load_vae
from lens_core.tiny import models
from lens_core.weights import inspect
from tests.compare import relative_l2
from tests.core.denoiser_layouts import velocity
from tests.core.test_loading import same_tensors


@pytest.mark.parametrize(
    ("shards", "layout"), [("10GB", "folder with one file"), ("600KB", "folder of 3 shards")]
)
def test_a_vae_saved_by_diffusers(
    tiny_folder: Path, tiny_models: Path, tmp_path: Path, shards: str, layout: str
):
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2.from_config(models.VAE)
    vae.load_state_dict(load_file(tiny_folder / "vae" / "diffusion_pytorch_model.safetensors"))
    vae.save_pretrained(tmp_path / "vae", max_shard_size=shards)
    [kind] = inspect(tmp_path)
    assert (kind.component, kind.layout) == ("vae", layout)
    want = load_vae(tiny_models / "vae" / "flux2_tiny_vae.safetensors", torch.float32)
    got = load_vae(tmp_path, torch.float32)
    assert same_tensors(got, want)
    latents = torch.randn(1, 128, 2, 2)
    assert torch.equal(got.decode(latents), want.decode(latents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["10GB", "800KB"])
def test_a_denoiser_saved_by_huggingface_hub(
    tiny_folder: Path, tmp_path: Path, dtype: torch.dtype, size: str
):
    from huggingface_hub import save_torch_state_dict

    plain = load_denoiser(tiny_folder, dtype)
    folder = tmp_path / "transformer"
    folder.mkdir()
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(plain.state_dict(), folder, filename_pattern=pattern, max_shard_size=size)
    [kind] = inspect(tmp_path)
    assert (len(kind.paths) > 1) == (size == "800KB")
    assert kind.quantisation == ("F32" if dtype == torch.float32 else "BF16")
    for held in (torch.float32, torch.bfloat16):
        got, want = load_denoiser(tmp_path, held), load_denoiser(tiny_folder, dtype).to(held)
        assert same_tensors(got, want)
        # The weights lie at other addresses, by which BLAS chooses the order of its sums: their last bits.
        assert relative_l2(velocity(got), velocity(want)) < (1e-6 if held == torch.float32 else 1e-2)
