"""Decoding in strips at the published sizes, against diffusers' decode of whole layers; random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.common import peak_gb
from lens_core.loading import load_vae
from lens_core.vae import LensVAE
from tests.compare import relative_l2

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
LUCK = 1.1  # of the same number of roundings
SIZES = [(64, 64), (78, 52), (90, 90)]  # 1024 x 1024, 1248 x 832, 1440 x 1440


@pytest.fixture(scope="module", autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def vae(full_models: Path) -> LensVAE:
    path = full_models / "vae" / "flux2-vae.safetensors"
    return load_vae(path, torch.bfloat16).to(CUDA).requires_grad_(False)


@pytest.fixture(scope="module")
def exact(full_models: Path) -> LensVAE:
    path = full_models / "vae" / "flux2-vae.safetensors"
    return load_vae(path, torch.float32).to(CUDA).requires_grad_(False)


@pytest.fixture(params=SIZES, ids=lambda size: f"{16 * size[0]}x{16 * size[1]}")
def latents(request: pytest.FixtureRequest, generator: torch.Generator) -> Tensor:
    return torch.randn(1, 128, *request.param, device=CUDA, dtype=torch.bfloat16, generator=generator)


def psnr(got: Tensor, want: Tensor) -> float:
    """In dB, of pictures in [-1, 1]."""
    return (10 * torch.log10(4 / (got.float() - want.float()).square().mean())).item()


def test_strips_are_as_close_to_fp32_as_whole_layers(vae: LensVAE, exact: LensVAE, latents: Tensor):
    # TensorFloat-32, PyTorch's default in convolutions, would round the reference like bf16 but for 2 bits.
    with torch.backends.cudnn.flags(allow_tf32=False):
        want = exact.decode_whole(latents.float())
    whole, in_strips = vae.decode_whole(latents), vae.decode(latents)
    assert relative_l2(in_strips, want) < LUCK * relative_l2(whole, want)
    del want
    # Independent roundings: between the two about sqrt(2) of either's distance from fp32, 0.3 dB or so apart.
    assert psnr(in_strips, whole) > 40


def test_the_peak_is_the_predicted_one(vae: LensVAE, latents: Tensor):
    vae.decode(latents)  # libraries' own buffers stay
    predicted = vae.decode_bytes(*latents.shape[2:], 2) / 1e9
    peak = peak_gb(lambda: vae.decode(latents))
    assert peak == pytest.approx(predicted, rel=0.05)
    assert peak < 0.3 * peak_gb(lambda: vae.decode_whole(latents))


def test_every_run_gives_the_same_bytes(vae: LensVAE, latents: Tensor):
    first = vae.decode(latents)
    assert torch.equal(vae.decode(latents), first)
    spare = torch.empty(2**28, device=CUDA)  # another state of the allocator
    assert torch.equal(vae.decode(latents), first)
    del spare
