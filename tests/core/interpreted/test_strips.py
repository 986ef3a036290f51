"""The VAE's kernels: against fp64, against their definitions, what they touch, and a whole decode by them."""

from __future__ import annotations

import pytest
import torch

from lens_core.kernels import strips as definitions
from lens_core.kernels.strip_registry import choose_strips, difference, triton_strip_kernels
from lens_core.kernels.triton import strip_launch
from lens_core.tiny.models import random_weights
from lens_core.vae import LensVAE, encode_strips, strips
from tests.compare import relative_l2
from tests.core import strip_cases as cases
from tests.core.interpreted.conftest import Fences

# What fp32 sums in another order differ by; a kernel's fp32 beside a definition's.
EXACT = 1e-6
# One rounding where something is stored, against the definitions' with as many. The interpreter cuts fp32 to
# bf16 instead of rounding it: up to 2^-7 = 8e-3.
ROUNDING = {torch.float32: EXACT, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}
# Channels published, tiny, and of no power of two; of 128 channels a program sees 32 pixels at once.
SHAPES = [(128, 2, 7), (128, 5, 33), (32, 3, 50), (24, 9, 31), (5, 4, 3), (512, 3, 5), (8, 1, 1)]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "none"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "none"])
def test_what_is_added_and_its_moments(shape, with_bias: bool, with_residual: bool, dtype: torch.dtype):
    x = cases.inside(cases.strip(*shape, dtype, mean=3))
    bias = torch.randn(shape[0]).to(dtype) if with_bias else None
    residual = cases.inside(cases.strip(*shape, dtype)) if with_residual else None
    want = x.clone()
    definitions.add_moments(want, bias, residual)
    count, mean, variance = cases.combined(strip_launch.add_moments(x, bias, residual))
    assert relative_l2(x, want) < ROUNDING[dtype]
    if not with_bias and not with_residual:
        assert torch.equal(x, want)
    # Of what was stored.
    exact = x.double()[0].flatten(1)
    assert torch.equal(count, torch.full_like(count, exact.shape[1]))
    assert relative_l2(mean, exact.mean(1)) < EXACT
    assert torch.allclose(variance, exact.var(1, correction=0), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 3, 256])
def test_moments_of_several_programs(parts: int, monkeypatch: pytest.MonkeyPatch):
    """The last one's share is smaller, and ends amid the pixels that are seen at once."""
    monkeypatch.setattr(strip_launch, "PARTS", parts)
    x = cases.strip(128, 11, 37, torch.float32)
    moments = strip_launch.add_moments(x)
    assert len(moments) == (1, 3, 13)[(1, 3, 256).index(parts)]
    exact = x.double()[0].flatten(1)
    assert moments[:, 0, 0].sum() == exact.shape[1] and len(moments[:, 0].unique()) == min(2, len(moments))
    _, mean, variance = cases.combined(moments)
    assert relative_l2(mean, exact.mean(1)) < EXACT
    assert relative_l2(variance, exact.var(1, correction=0)) < EXACT


@pytest.mark.parametrize("parts", [1, 4])
def test_small_variances_beside_large_means(parts: int, monkeypatch: pytest.MonkeyPatch):
    """1e4 and deviations near 1 in fp32: x^2 - mean^2 would lose the variance."""
    monkeypatch.setattr(strip_launch, "PARTS", parts)
    x = cases.strip(128, 16, 33, torch.float32, mean=1e4)
    x[:, :, 8:] += 3
    exact = x.double()[0].flatten(1)
    moments = strip_launch.add_moments(x)
    _, mean, variance = cases.combined(moments)
    # A mean near 1e4 is held to 5e-4, so variances between parts to some 1e-4.
    assert relative_l2(mean, exact.mean(1)) < EXACT
    assert relative_l2(variance, exact.var(1, correction=0)) < 1e-4
    weight, bias = torch.randn(2, 128)
    scale, _ = strip_launch.affine(moments, weight, bias, 32, 1e-6)
    assert relative_l2(scale.flatten(), cases.group_norm([x], weight, bias, 32, 1e-6)[0]) < 1e-4


def test_an_outlier_comes_first():
    """The first pixels are what the others' distances are summed from."""
    x = cases.strip(128, 64, 33, torch.float32)
    x[:, :, 0] += 1000
    _, mean, variance = cases.combined(strip_launch.add_moments(x))
    exact = x.double()[0].flatten(1)
    assert relative_l2(mean, exact.mean(1)) < EXACT
    assert relative_l2(variance, exact.var(1, correction=0)) < 1e-5


def test_a_constant_has_no_variance():
    x = torch.full((1, 16, 40, 33), 3.14159).contiguous(memory_format=torch.channels_last)
    _, mean, squares = strip_launch.add_moments(x).unbind(1)
    assert (squares >= 0).all() and squares.max() < 1e-9 and (mean - 3.14159).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (512, 32), (32, 32), (24, 4), (15, 5), (6, 1)])
@pytest.mark.parametrize("heights", [(4,), (6, 6, 1)], ids=str)
def test_the_norm_of_parts(channels: int, groups: int, heights: tuple[int, ...], dtype: torch.dtype):
    pictures = [cases.strip(channels, rows, 9, dtype, mean=index) for index, rows in enumerate(heights)]
    weight, bias = torch.randn(2, channels).to(dtype)
    moments = torch.cat([strip_launch.add_moments(part) for part in pictures])
    got = torch.stack(strip_launch.affine(moments, weight, bias, groups, 1e-6))
    want = torch.stack(definitions.affine(moments, weight, bias, groups, 1e-6))
    assert got.shape == want.shape == (2, 1, channels, 1, 1) and got.dtype == torch.float32
    assert relative_l2(got, want) < EXACT
    assert relative_l2(got.view(2, -1), cases.group_norm(pictures, weight, bias, groups, 1e-6)) < EXACT


def test_many_parts(monkeypatch: pytest.MonkeyPatch):
    """More than a program sees at once, and none of them a multiple."""
    monkeypatch.setattr(strip_launch, "_NUMBERS", 64)
    moments = torch.rand(77, 3, 12) + 1
    weight, bias = torch.randn(2, 12)
    got = torch.stack(strip_launch.affine(moments, weight, bias, 4, 1e-6))
    assert relative_l2(got, torch.stack(definitions.affine(moments, weight, bias, 4, 1e-6))) < EXACT


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_norm_and_silu(shape, dtype: torch.dtype):
    piece, (scale, shift) = cases.inside(cases.strip(*shape, dtype)), torch.randn(2, 1, shape[0], 1, 1)
    window, want = cases.inside(torch.empty_like(piece)), torch.empty_like(piece)
    strip_launch.normalise_silu(window, piece, scale, shift)
    definitions.normalise_silu(want, piece, scale, shift)
    assert relative_l2(window, want) < ROUNDING[dtype]


def test_silu_of_large_numbers_is_finite():
    piece = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 1e4]).view(1, 6, 1, 1)
    window, one = torch.empty_like(piece), torch.ones(1, 6, 1, 1)
    strip_launch.normalise_silu(window, piece, one, 0 * one)
    assert torch.allclose(window, torch.nn.functional.silu(piece), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("both", [True, False], ids=["both ways", "in its row"])
def test_doubling(shape, both: bool):
    channels, rows, width = shape
    piece = cases.inside(cases.strip(*shape, torch.bfloat16))
    size = (1, channels, (1 + both) * rows, 2 * width)
    window = cases.inside(torch.empty(size, dtype=piece.dtype, memory_format=torch.channels_last))
    want = torch.empty(size, dtype=piece.dtype)
    strip_launch.double(window, piece)
    definitions.double(want, piece)
    assert torch.equal(window, want)


def test_nothing_beside_is_touched(fences: Fences):
    """Sizes of which no tile is full."""
    channels, rows, width = 24, 3, 5

    def fenced(count: int = 1) -> torch.Tensor:
        x = fences.around(torch.randn(1, count * rows, count * width, channels).half())
        return x.permute(0, 3, 1, 2)

    x, residual, window, tall = fenced(), fenced(), fenced(), fenced(2)
    bias = fences.around(torch.randn(channels).half())
    moments = strip_launch.add_moments(x, bias, residual)
    scale, shift = strip_launch.affine(moments, bias, bias, 8, 1e-6)
    strip_launch.normalise_silu(window, x, scale, shift)
    strip_launch.double(tall, x)
    for written in (x, moments, scale, shift, window, tall):
        assert torch.isfinite(written).all()
    fences.assert_intact()


def test_channels_apart_are_copied_or_refused():
    apart = torch.randn(1, 6, 4, 5)
    together, (scale, shift) = apart.contiguous(memory_format=torch.channels_last), torch.randn(2, 1, 6, 1, 1)
    got, want = torch.empty_like(together), torch.empty_like(together)
    strip_launch.normalise_silu(got, apart, scale, shift)
    definitions.normalise_silu(want, apart, scale, shift)
    assert relative_l2(got, want) < EXACT
    total = together.clone()
    strip_launch.add_moments(total, None, apart)
    assert torch.equal(total, 2 * apart)
    with pytest.raises(ValueError, match="has not its channels together"):
        strip_launch.add_moments(apart)
    with pytest.raises(ValueError, match="has not its channels together"):
        strip_launch.normalise_silu(together[..., 1:], together[..., 1:], scale, shift)


def test_the_self_test_passes():
    assert difference(torch.device("cpu"), torch.float16) < 1e-3
    assert choose_strips(torch.device("cpu"), torch.float16) is triton_strip_kernels()


def random_vae(dtype: torch.dtype) -> LensVAE:
    """With shortcuts, which the tiny VAE has not."""
    sizes = {"block_out_channels": (16, 32, 48, 48), "layers_per_block": 1, "norm_num_groups": 16}
    vae = LensVAE(sizes).eval()
    vae.model.load_state_dict(random_weights(vae.model, torch.Generator().manual_seed(0)), strict=False)
    return vae.to(dtype)


@pytest.mark.parametrize("elements", [2**12, 2**23])
def test_a_decode_and_an_encode(elements: int, monkeypatch: pytest.MonkeyPatch):
    """In fp32, so that what is wrong shows. Rows of the levels' strips do not fit each other's."""
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", elements)
    for module in (strips, encode_strips):
        monkeypatch.setattr(module, "layout_of", lambda _: torch.channels_last)
        monkeypatch.setattr(module, "choose_strips", lambda *_: triton_strip_kernels())
    latents, image = torch.randn(1, 128, 2, 1), torch.rand(1, 3, 16, 16)
    vae, exact = random_vae(torch.float32), random_vae(torch.float64)
    picture = exact.decode_whole(latents.double())
    assert relative_l2(vae.decode(latents), picture) < 3e-6
    if elements > 2**20:  # there is one strip
        return
    assert relative_l2(vae.decode(latents, frugal_memory=True), picture) < 3e-6
    assert relative_l2(vae.encode(image), exact.encode_whole(image.double())) < 3e-6
