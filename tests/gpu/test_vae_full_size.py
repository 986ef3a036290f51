"""Decoding and encoding in strips at the published sizes, against diffusers' whole layers; random weights;
the kernels at the shapes that they meet there, against their definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.common import peak_gb
from lens_core.kernels import EAGER_STRIPS, choose_strips
from lens_core.kernels import strips as definitions
from lens_core.kernels.triton import strip_launch
from lens_core.loading import load_vae
from lens_core.vae import LensVAE, strips
from tests.compare import relative_l2
from tests.core import strip_cases as cases

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
LUCK = 1.1  # of the same number of roundings
SIZES = [(64, 64), (78, 52), (90, 90)]  # 1024 x 1024, 1248 x 832, 1440 x 1440
# Strips of the levels at 1440 x 1440 and 1024 x 1024, a row beside one, and a level of an odd size.
STRIPS = [(128, 46, 1440), (128, 64, 1024), (256, 24, 1440), (512, 12, 1440), (512, 1, 720), (512, 181, 180)]
# Both round once where they store. fp32 sums of up to 2^16 numbers differ by less than EXACT.
ROUNDING = {torch.bfloat16: 2e-3, torch.float16: 3e-4}
EXACT = 2e-6


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


def test_the_frugal_way(vae: LensVAE, latents: Tensor):
    assert psnr(vae.decode(latents, frugal_memory=True), vae.decode(latents)) > 50
    predicted = vae.decode_bytes(*latents.shape[2:], 2, frugal_memory=True) / 1e9
    peak = peak_gb(lambda: vae.decode(latents, frugal_memory=True))
    assert 0.8 * predicted < peak < predicted < 1.0


def test_encoding_is_as_close_to_fp32_and_takes_what_was_predicted(
    vae: LensVAE, exact: LensVAE, latents: Tensor, generator: torch.Generator
):
    size = [16 * side for side in latents.shape[2:]]
    images = torch.rand(1, 3, *size, device=CUDA, dtype=torch.bfloat16, generator=generator) * 2 - 1
    with torch.backends.cudnn.flags(allow_tf32=False):
        want = exact.encode_whole(images.float())
    whole, in_strips = vae.encode_whole(images), vae.encode(images)
    assert relative_l2(in_strips, want) < LUCK * relative_l2(whole, want)
    del want
    predicted = vae.encode_bytes(*latents.shape[2:], 2) / 1e9
    assert peak_gb(lambda: vae.encode(images)) == pytest.approx(predicted, rel=0.05)


def test_every_run_gives_the_same_bytes(vae: LensVAE, latents: Tensor):
    first = vae.decode(latents)
    assert torch.equal(vae.decode(latents), first)
    spare = torch.empty(2**28, device=CUDA)  # another state of the allocator
    assert torch.equal(vae.decode(latents), first)
    del spare


def test_the_kernels_run_and_the_definitions_are_as_close(
    vae: LensVAE, exact: LensVAE, latents: Tensor, monkeypatch: pytest.MonkeyPatch
):
    assert choose_strips(CUDA, torch.bfloat16).name == "triton"
    with torch.backends.cudnn.flags(allow_tf32=False):
        want = exact.decode_whole(latents.float())
    by_kernels = vae.decode(latents)
    monkeypatch.setattr(strips, "choose_strips", lambda *_: EAGER_STRIPS)
    by_definitions = vae.decode(latents)
    assert relative_l2(by_kernels, want) < LUCK * relative_l2(by_definitions, want)
    assert psnr(by_kernels, by_definitions) > 40


@pytest.fixture(params=STRIPS, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


@pytest.fixture(autouse=True)
def _on_the_gpu(request: pytest.FixtureRequest):
    """Strips are made there."""
    if "shape" not in request.fixturenames:
        yield
        return
    torch.manual_seed(0)
    with CUDA:
        yield


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "none"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "none"])
def test_what_is_added_and_its_moments(shape, with_bias: bool, with_residual: bool, dtype: torch.dtype):
    x = cases.inside(cases.strip(*shape, dtype, mean=3))
    bias = torch.randn(shape[0]).to(dtype) if with_bias else None
    residual = cases.inside(cases.strip(*shape, dtype)) if with_residual else None
    want, again = x.double(), x.clone()
    if bias is not None:
        want += bias.double().view(1, -1, 1, 1)
    if residual is not None:
        want += residual.double()
    moments = strip_launch.add_moments(x, bias, residual)
    assert relative_l2(x, want) < ROUNDING[dtype]
    count, mean, variance = cases.combined(moments)
    # Of what was stored.
    theirs = x.double()[0].flatten(1)
    assert torch.equal(count, torch.full_like(count, theirs.shape[1]))
    assert relative_l2(mean, theirs.mean(1)) < EXACT
    assert relative_l2(variance, theirs.var(1, correction=0)) < EXACT
    assert torch.equal(strip_launch.add_moments(again, bias, residual), moments)
    weight, offset = torch.randn(2, shape[0]).to(dtype)
    got = torch.stack(strip_launch.affine(moments, weight, offset, 32, 1e-6))
    assert relative_l2(got, torch.stack(definitions.affine(moments, weight, offset, 32, 1e-6))) < EXACT
    assert relative_l2(got.view(2, -1), cases.group_norm([x], weight, offset, 32, 1e-6)) < EXACT


def test_small_variances_beside_large_means(shape):
    """1e4 and deviations near 1 in fp32: x^2 - mean^2 would lose the variance."""
    x = cases.strip(*shape, torch.float32, mean=1e4)
    _, mean, variance = cases.combined(strip_launch.add_moments(x))
    exact = x.double()[0].flatten(1)
    assert relative_l2(mean, exact.mean(1)) < EXACT
    assert relative_l2(variance, exact.var(1, correction=0)) < 1e-4


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_norm_and_silu(shape, dtype: torch.dtype):
    piece, (scale, shift) = cases.inside(cases.strip(*shape, dtype)), torch.randn(2, 1, shape[0], 1, 1)
    window, want = cases.inside(torch.empty_like(piece)), torch.empty_like(piece)
    strip_launch.normalise_silu(window, piece, scale, shift)
    definitions.normalise_silu(want, piece, scale, shift)
    assert relative_l2(window, want) < ROUNDING[dtype] / 2


@pytest.mark.parametrize("both", [True, False], ids=["both ways", "in its row"])
def test_doubling(shape, both: bool):
    channels, rows, width = shape
    piece = cases.inside(cases.strip(*shape, torch.bfloat16))
    size = (1, channels, (1 + both) * rows, 2 * width)
    window = cases.inside(torch.zeros(size, dtype=piece.dtype).contiguous(memory_format=torch.channels_last))
    want = torch.empty(size, dtype=piece.dtype)
    strip_launch.double(window, piece)
    definitions.double(want, piece)
    assert torch.equal(window, want)
