"""Decoding and encoding in strips against diffusers' whole layers: equal, in the memory predicted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core.kernels import EAGER_STRIPS
from lens_core.tiny.models import VAE, random_weights
from lens_core.vae import LensVAE, autoencoder, encode_strips, frugal, strips
from lens_core.vae.strips import Strips, decode_bytes, strip_rows
from tests.compare import relative_l2
from tests.live_bytes import LiveBytes

# In fp64 the two differ by rounding alone, some 1e-15; a wrong row, halo or statistic is at 1e-3 or more.
EXACT = 1e-13
# In fp32 either is 1e-6 from fp64; measured between them: 0.9e-6 to 1.7e-6.
ROUNDING = 3e-6
# Levels of different widths, so that there are shortcuts, which the tiny VAE has not.
WIDTHS = {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 1}
# A strip of a few rows at every level of pictures of some 64 pixels.
FEW_ROWS = 2**13


def random_vae(config: dict[str, Any], dtype: torch.dtype) -> LensVAE:
    vae = LensVAE(config).eval()
    vae.model.load_state_dict(random_weights(vae.model, torch.Generator().manual_seed(0)), strict=False)
    return vae.to(dtype)


@pytest.fixture(scope="module", params=[VAE, WIDTHS], ids=["tiny", "widths"])
def exact(request: pytest.FixtureRequest) -> LensVAE:
    return random_vae(request.param, torch.float64)


@pytest.fixture(scope="module")
def widths() -> dict[torch.dtype, LensVAE]:
    return {dtype: random_vae(WIDTHS, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", FEW_ROWS)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (3, 5), (7, 2)])
@pytest.mark.parametrize("elements", [1, FEW_ROWS, 5 * FEW_ROWS, 2**25])
def test_decode_is_diffusers(exact: LensVAE, size, elements, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", elements)
    latents = torch.randn(1, 128, *size, dtype=torch.float64)
    want = exact.decode_whole(latents)
    for frugally in (False, True):
        got = exact.decode(latents, frugally)
        assert got.shape == want.shape and got.is_contiguous()
        assert relative_l2(got, want) < EXACT


@pytest.mark.parametrize("rows", [2, 6, 10, 48, 1000])
def test_any_height_of_the_strips_gives_the_same_picture(
    exact: LensVAE, rows: int, monkeypatch: pytest.MonkeyPatch
):
    """48 divides the picture's height, 10 leaves a rest, 1000 is more than it has."""
    latents = torch.randn(1, 128, 6, 2, dtype=torch.float64)
    monkeypatch.setattr(strips, "strip_rows", lambda *_: rows)
    assert relative_l2(exact.decode(latents), exact.decode_whole(latents)) < EXACT


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 2)])
@pytest.mark.parametrize("elements", [1, FEW_ROWS, 5 * FEW_ROWS, 2**25])
def test_encode_is_diffusers(exact: LensVAE, size, elements, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", elements)
    images = 2 * torch.rand(2, 3, *(16 * side for side in size), dtype=torch.float64) - 1
    before = images.clone()
    want, got = exact.encode_whole(images), exact.encode(images)
    assert got.shape == want.shape == (2, 128, *size)
    assert relative_l2(got, want) < EXACT and torch.equal(images, before)


@pytest.mark.parametrize("size", [(17, 32), (30, 47), (49, 33)])
@pytest.mark.usefixtures("few_rows")
def test_pictures_of_odd_sizes(exact: LensVAE, size):
    """No node lets them through, but the function takes what diffusers' encode takes."""
    images = torch.rand(1, 3, *size, dtype=torch.float64)
    got = encode_strips.encode(exact.model, images, lambda: None)
    assert relative_l2(got, exact.model.encode(images).latent_dist.mode()) < EXACT


@pytest.mark.usefixtures("few_rows")
def test_gpus_layout_gives_the_same_picture(exact: LensVAE, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strips, "layout_of", lambda _: torch.channels_last)
    latents = torch.randn(1, 128, 5, 3, dtype=torch.float64)
    assert relative_l2(exact.decode(latents), exact.decode_whole(latents)) < EXACT
    images = torch.rand(1, 3, 48, 80, dtype=torch.float64)
    assert relative_l2(exact.encode(images), exact.encode_whole(images)) < EXACT


@pytest.mark.usefixtures("few_rows")
def test_latents_of_odd_sizes(exact: LensVAE):
    """No packed latents are, but the function takes what diffusers' decode takes."""
    latents = torch.randn(1, 32, 5, 3, dtype=torch.float64)
    got = strips.decode(exact.model, latents, lambda: None)
    assert relative_l2(got, exact.model.decode(latents).sample) < EXACT


@pytest.mark.usefixtures("few_rows")
def test_the_attention_in_chunks_of_queries(exact: LensVAE, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strips, "ATTENTION_SCORES", 7 * 60)  # 7 of 60 queries at a time
    latents = torch.randn(1, 128, 5, 3, dtype=torch.float64)
    assert relative_l2(exact.decode(latents), exact.decode_whole(latents)) < EXACT


@pytest.mark.usefixtures("few_rows")
def test_pictures_of_a_batch_are_decoded_as_if_alone(widths: dict[torch.dtype, LensVAE]):
    vae, latents = widths[torch.float32], torch.randn(2, 128, 3, 5)
    before = latents.clone()
    together = vae.decode(latents)
    assert torch.equal(latents, before)
    assert torch.equal(together, torch.cat([vae.decode(latents[:1]), vae.decode(latents[1:])]))
    assert relative_l2(together, vae.decode_whole(latents)) < ROUNDING


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("dtype, bound, luck", [(torch.float32, ROUNDING, 2), (torch.bfloat16, 0.025, 1.25)])
def test_strips_round_no_more_than_whole_layers(widths: dict[torch.dtype, LensVAE], dtype, bound, luck):
    """Of the same 30 roundings the luck differs; the bound of bf16 is test_vae.py's for whole layers.

    In fp32 what rounds are the convolutions' sums, and a CPU's library sums otherwise for another size: of
    one picture whole layers are 1.1e-6 off with AVX-512 and 1.8e-6 with AVX2, strips 1.3e-6 with either.
    """
    latents = torch.randn(1, 128, 6, 5).to(dtype)
    want = widths[torch.float64].decode_whole(latents.double())
    in_strips = relative_l2(widths[dtype].decode(latents), want)
    whole = relative_l2(widths[dtype].decode_whole(latents), want)
    assert in_strips < luck * whole and in_strips < bound
    images = torch.rand(1, 3, 96, 80).to(dtype)
    want = widths[torch.float64].encode_whole(images.double())
    in_strips = relative_l2(widths[dtype].encode(images), want)
    assert in_strips < luck * relative_l2(widths[dtype].encode_whole(images), want) and in_strips < bound


def filled(x: Tensor, rows: int) -> Strips:
    picture = Strips(rows, *x.shape[2:])
    for part in x.split(rows, dim=2):
        picture.append(part.clone())
    return picture


def joined(picture: Strips) -> Tensor:
    return torch.cat(list(picture.pieces(0, picture.height)), dim=2)


@pytest.fixture(scope="module")
def published() -> Any:
    """The decoder of the published sizes, fp32."""
    return random_vae({}, torch.float32).model.decoder


@pytest.mark.usefixtures("few_rows")
def test_layers_of_the_published_widths(published: Any):
    """The finest level's enlarging layer and the one after, 256 channels to 128; the attention."""
    x = torch.randn(1, 256, 15, 9)
    want = published.up_blocks[2].upsamplers[0](x)
    enlarged = strips._upsample(published.up_blocks[2].upsamplers[0].conv, filled(x, 4), lambda: None)
    assert len(enlarged.parts) > 5
    assert relative_l2(joined(enlarged), want) < ROUNDING
    want = published.up_blocks[3].resnets[0](want, None)
    assert want.shape == (1, 128, 30, 18)
    got = strips.through_resnet(published.up_blocks[3].resnets[0], enlarged, lambda: None)
    assert relative_l2(joined(got), want) < ROUNDING
    x = torch.randn(1, 512, 9, 7)
    got = strips.attended(published.mid_block.attentions[0], filled(x, 4))
    assert relative_l2(joined(got), published.mid_block.attentions[0](x)) < ROUNDING


def test_a_layer_uses_its_input_up(published: Any):
    x = filled(torch.randn(1, 256, 10, 4), 4)
    strips.through_resnet(published.up_blocks[3].resnets[0], x, lambda: None)
    assert x.parts == [None, None, None]


@pytest.mark.parametrize("rows", [2, 6, 64])
def test_small_variances_beside_large_means_survive(rows: int):
    """1e4 +- 1 in fp32: x^2 - mean^2 would be right to 1e8 * 6e-8 = 6, so the variance of 1 would be lost."""
    norm = torch.nn.GroupNorm(4, 8, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = 1e4 + torch.randn(1, 8, 50, 40) * torch.linspace(0.5, 2, 8).view(1, -1, 1, 1)
    x[:, :, 20:] += 3  # strips of different means
    scale, shift = filled(x, rows).affine(norm)
    exact = x.double().view(4, -1)
    deviation = torch.sqrt(exact.var(1, correction=0) + norm.eps).repeat_interleave(2)
    # A strip's mean is held to 5e-4, so the part of the variance that is between strips to some 1e-4.
    assert scale.flatten().double() == pytest.approx((norm.weight / deviation).detach(), rel=1e-4)
    want = torch.nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
    # fp32 holds numbers near 1e4 to 5e-4, the shift among them.
    assert (x * scale + shift - want).abs().max() < 4 * 5e-4


def test_no_seams(widths: dict[torch.dtype, LensVAE], monkeypatch: pytest.MonkeyPatch):
    """Rows beside strips' borders are as close to whole layers as others; without halos they are not."""
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 4 * FEW_ROWS)
    latents = torch.randn(1, 128, 8, 5)
    want = widths[torch.float64].decode_whole(latents.double())
    rows, row = strip_rows(32, *want.shape[2:]), torch.arange(want.shape[2])
    at_border = ((row % rows == 0) | (row % rows == rows - 1))[1:-1]  # of the finest level
    assert at_border.sum() > 10 and at_border.double().mean() < 0.25

    def seam() -> float:
        """Root mean square error of the rows at borders over that of the others."""
        error = (widths[torch.float32].decode(latents) - want).square().mean((0, 1, 3))[1:-1]
        return math.sqrt(error[at_border].mean() / error[~at_border].mean())

    assert 0.8 < seam() < 1.25
    fill = strips.fill

    def without_halo(window: Tensor, pieces: Any, write: Any, scale: int = 1) -> Any:
        halo = window.shape[2] == 1 and window.shape[3] == want.shape[3]
        return window.zero_() if halo else fill(window, pieces, write, scale)

    monkeypatch.setattr(strips, "fill", without_halo)
    error = relative_l2(widths[torch.float32].decode(latents), want)
    assert error > 1000 * ROUNDING and seam() > 1.5


def test_strips_are_even_and_cut_by_shape():
    for channels, height, width in [(128, 1024, 1024), (128, 1440, 1440), (512, 180, 180), (256, 7, 5)]:
        rows = strip_rows(channels, height, width)
        assert rows % 2 == 0
        assert rows * width * channels <= strips.STRIP_ELEMENTS + 2 * width * channels
    assert strip_rows(128, 1024, 1024) == 256
    assert strip_rows(512, 4, 2**20) == 2, "a row pair is the least"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "config, size, elements",
    [
        (VAE, (16, 10), 2**14),
        (VAE, (8, 6), 2**25),
        (WIDTHS, (16, 10), 2**15),
        ({}, (4, 6), 2**17),
        ({}, (4, 6), 2**25),
    ],
    ids=["tiny", "tiny, one strip", "widths", "published", "published, one strip"],
)
def test_the_peak_is_the_predicted_one(config, size, elements, dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", elements)
    vae = LensVAE(config).eval().to(dtype)
    latents = torch.randn(1, 128, *size, dtype=dtype)
    with LiveBytes() as memory:
        vae.decode(latents)
    libraries = strips.CONV_WORKSPACE + strips.MOMENTS_SCRATCH
    assert memory.peak == pytest.approx(vae.decode_bytes(*size, dtype.itemsize) - libraries, rel=0.05)
    images = torch.randn(1, 3, *(16 * side for side in size), dtype=dtype)
    with LiveBytes() as memory:
        vae.encode(images)
    assert memory.peak == pytest.approx(vae.encode_bytes(*size, dtype.itemsize) - libraries, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config, elements", [(VAE, 2**14), (VAE, 2**16), (WIDTHS, 2**15)])
def test_the_frugal_way_takes_half_and_no_more_than_predicted(config, elements, dtype, monkeypatch):
    """In small strips, as those of a large picture are beside it."""
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", elements)
    vae = LensVAE(config).eval().to(dtype)
    latents, peaks = torch.randn(1, 128, 16, 10, dtype=dtype), []
    for frugally in (False, True):
        with LiveBytes() as memory:
            vae.decode(latents, frugally)
        peaks.append(memory.peak)
    assert peaks[1] < 0.6 * peaks[0]
    libraries = strips.CONV_WORKSPACE + strips.MOMENTS_SCRATCH
    predicted = vae.decode_bytes(16, 10, dtype.itemsize, frugal_memory=True) - libraries
    assert 0.9 * predicted < peaks[1] <= predicted


def test_the_frugal_way_has_room_in_a_gigabyte():
    """At 1440 x 1440, where the usual one has not; an H200 took 0.79 GB."""
    usual, least = (way.decode_bytes((128, 256, 512, 512), 90, 90, 2, True) for way in (strips, frugal))
    assert 0.79e9 < least < 0.85e9 and usual > 1e9


@pytest.mark.parametrize("config", [VAE, WIDTHS], ids=["tiny", "widths"])
@pytest.mark.parametrize("elements", [2**14, 2**25])
def test_the_peak_without_copies_in_fp32(config, elements: int, monkeypatch: pytest.MonkeyPatch):
    """As a GPU's kernels take statistics; here nobody does, only the memory is looked at."""

    def add_moments(strip: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            strip.add_(residual)
        return torch.ones(1, 3, strip.shape[1])

    fused = replace(EAGER_STRIPS, add_moments=add_moments)
    monkeypatch.setattr(strips, "choose_strips", lambda *_: fused)
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", elements)
    vae = LensVAE(config).eval().bfloat16()
    with LiveBytes() as memory:
        vae.decode(torch.randn(1, 128, 16, 10).bfloat16())
    channels = vae.model.config.block_out_channels
    predicted = decode_bytes(channels, 16, 10, 2, fused=True) - strips.CONV_WORKSPACE
    assert memory.peak == pytest.approx(predicted, rel=0.05)


def test_an_estimate_is_for_the_kernels_that_will_run(
    widths: dict[torch.dtype, LensVAE], monkeypatch: pytest.MonkeyPatch
):
    vae, asked = widths[torch.bfloat16], []

    def choose(*what: Any) -> Any:
        asked.append(what)
        return None if what[0].type == "cuda" else EAGER_STRIPS

    monkeypatch.setattr(autoencoder, "choose_strips", choose)
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    want = [decode_bytes(WIDTHS["block_out_channels"], 64, 64, 2, fused) for fused in (True, False)]
    assert want[0] < want[1]
    assert [vae.decode_bytes(64, 64, 2, device) for device in (cuda, cpu, None)] == [*want, want[1]]
    assert asked == [(device, torch.bfloat16) for device in (cuda, cpu, cpu)]


def test_a_picture_takes_two_tensors_of_128_channels():
    """Whole layers took 2.6 GB at 1024 x 1024 and 5.0 GB at 1440 x 1440, measured on a GPU."""
    for side, limit in ((64, 1.2e9), (90, 1.7e9)):
        peak = decode_bytes((128, 256, 512, 512), side, side, 2)
        assert 2 * 128 * (16 * side) ** 2 * 2 < peak < limit


@pytest.mark.usefixtures("few_rows")
def test_a_raise_between_strips_ends_the_encode(widths: dict[torch.dtype, LensVAE], monkeypatch):
    vae, calls = widths[torch.float32], []

    def stop() -> None:
        calls.append(None)
        if len(calls) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(vae, "on_strip", stop)
    with pytest.raises(KeyboardInterrupt):
        vae.encode(torch.rand(1, 3, 64, 64))
    assert len(calls) == 20


@pytest.mark.usefixtures("few_rows")
def test_a_raise_between_strips_ends_the_decode(widths: dict[torch.dtype, LensVAE]):
    vae, latents, calls = widths[torch.float32], torch.randn(1, 128, 4, 4), []
    want = vae.decode(latents)
    nothing = vae.on_strip

    def stop() -> None:
        calls.append(None)
        if len(calls) == 20:
            raise KeyboardInterrupt

    vae.on_strip = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            vae.decode(latents)
    finally:
        vae.on_strip = nothing
    assert len(calls) == 20
    assert torch.equal(vae.decode(latents), want)


def test_no_gradients_are_gathered(widths: dict[torch.dtype, LensVAE]):
    with torch.enable_grad():
        assert not widths[torch.float32].decode(torch.randn(1, 128, 1, 1)).requires_grad
