"""Pictures as the start: image to image, inpainting, outpainting, a second pass, variations of a seed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from lens_core.sampling import bucket, sigmas
from tests.compare import relative_l2
from tests.host.helpers import random_latent, recorded

GRID = (6, 4)
# Kept latents: x + (denoised - x) / sigma * sigma is denoised up to fp32 rounding.
KEPT = 1e-6


@pytest.fixture(scope="module", autouse=True)
def more_nodes(host):
    """Nodes that ComfyUI loads beside its core ones."""
    import nodes

    for name in ("differential_diffusion", "mask"):
        path = Path(nodes.__file__).parent / "comfy_extras" / f"nodes_{name}.py"
        assert asyncio.run(nodes.load_custom_node(str(path), module_parent="comfy_extras")), name


@pytest.fixture
def encode(host, tiny):
    """LensImageToLatent at the smallest base; keyword arguments replace or add inputs."""

    def run(image, **changes):
        inputs = {"vae": tiny.vae, "base_resolution": "256", "fit": "crop"}
        return host.run("LensImageToLatent", image=image, **{**inputs, **changes})

    return run


def test_pictures_are_encoded_in_the_nearest_bucket(host, tiny, encode):
    pictures = torch.rand(2, 120, 200, 3)
    latent, fitted, mask = encode(pictures)
    height, width = bucket(256, "16:9")
    assert fitted.shape == (2, height, width, 3)
    (want,) = host.run("VAEEncode", pixels=fitted, vae=tiny.vae)
    assert latent.keys() == {"samples"} and torch.equal(latent["samples"], want["samples"])
    assert latent["samples"].shape == (2, 128, height // 16, width // 16)
    assert mask.all() and mask.shape == (1, height, width)


def test_padding_is_redrawn_and_the_picture_kept(draw, encode):
    latent, fitted, mask = encode(torch.rand(1, 300, 100, 3), fit="pad")
    covered = latent["noise_mask"]
    assert fitted.shape[1:3] == bucket(256, "1:2") and covered.shape == (1, 1, 22, 11)
    assert mask.shape == fitted.shape[:3] and mask[..., 0].all() and not mask[:, 0, 88].any()
    assert torch.equal(mask[:, ::16, ::16], covered[:, 0])
    got, given = (x["samples"] for x in (draw(latent=latent), latent))
    kept = (covered == 0).expand_as(got)
    assert kept.any() and not kept.all()
    torch.testing.assert_close(got[kept], given[kept], rtol=0, atol=KEPT)
    assert relative_l2(got[~kept], given[~kept]) > 0.1


def test_what_is_no_lens_vae_is_named(host, encode):
    with pytest.raises(Exception, match="No VAE arrived"):
        encode(torch.rand(1, 32, 32, 3), vae=None)

    class OtherVAE:
        latent_channels = 16

    with pytest.raises(Exception, match="latents have 16 channels; Lens' have 128"):
        encode(torch.rand(1, 32, 32, 3), vae=OtherVAE())


@pytest.mark.parametrize("by", ["steps", "noise level"])
def test_denoise_1_is_text_to_image_and_0_the_round_trip(draw, by):
    """Bit for bit."""
    picture = {"samples": random_latent(1, GRID)}
    assert torch.equal(draw(latent=picture, denoise_by=by)["samples"], draw()["samples"])
    assert torch.equal(draw(latent=picture, denoise_by=by, denoise=0.0)["samples"], picture["samples"])


def test_denoise_by_noise_level(host, tiny, draw):
    """The run starts at that level, in LensSampler as by LensScheduler, with all of its steps."""
    model, recorder = recorded(tiny.model)
    picture = {"samples": random_latent(1, GRID)}
    draw(model=model, latent=picture, steps=20, cfg=1.0, denoise=0.5, denoise_by="noise level")
    (levels,) = host.run("LensScheduler", steps=20, latent=picture, denoise=0.5, denoise_by="noise level")
    assert [call.sigma for call in recorder.calls] == pytest.approx(levels[:-1].tolist(), abs=1e-7)
    assert levels[0] == pytest.approx(0.5, abs=0.01) and len(levels) == 21


@pytest.mark.parametrize("differential", [False, True])
@pytest.mark.parametrize("denoise", [1.0, 0.6])
def test_inpainting_keeps_what_is_outside_the_mask(host, tiny, draw, encode, denoise, differential):
    image, mask = torch.rand(1, 256, 256, 3), torch.zeros(1, 256, 256)
    mask[:, 100:180, 90:200] = 1
    latent, *_ = encode(image, mask=mask)
    (model,) = host.run("DifferentialDiffusion", model=tiny.model) if differential else (tiny.model,)
    settings = {"steps": 3, "denoise": denoise, "denoise_by": "noise level"}
    got = draw(model=model, latent=latent, **settings)["samples"]
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[6:12, 5:13] = True  # all that the mask touches
    given = latent["samples"]
    torch.testing.assert_close(got[..., ~inside], given[..., ~inside], rtol=0, atol=KEPT)
    assert (got - given).abs().amax(1)[0][inside].min() > 0.01


def test_the_picture_outside_the_mask_is_kept(host, tiny, draw, encode):
    """Decoding alone does not: the VAE's norms see what has changed. Put over the given picture, or over its
    round trip, the rest is that one's."""
    mask = torch.zeros(1, 256, 256)
    mask[:, 100:180, 90:200] = 1
    latent, fitted, redrawn = encode(torch.rand(1, 256, 256, 3), mask=mask)
    drawn, trip = (tiny.vae.decode(x["samples"]) for x in (draw(latent=latent), latent))
    kept = redrawn[0] == 0
    assert kept.sum() == 256 * 256 - 96 * 128
    for below in (fitted, trip):
        over = {"destination": below, "source": drawn, "x": 0, "y": 0, "resize_source": False}
        (result,) = host.run("ImageCompositeMasked", **over, mask=redrawn)
        assert torch.equal(result[:, kept], below[:, kept])
        assert torch.equal(result[:, ~kept], drawn[:, ~kept])
        assert (result - below).abs().mean() > 1 / 255


def test_differential_diffusion_redraws_grey_less(host, tiny, draw, encode):
    """White, grey and black columns; grey ones are let go of in the later half of the steps."""
    mask = torch.zeros(1, 256, 256)
    mask[..., :96], mask[..., 96:160] = 1, 0.5
    latent, *_ = encode(torch.rand(1, 256, 256, 3), mask=mask)
    (model,) = host.run("DifferentialDiffusion", model=tiny.model)
    moved = (draw(model=model, latent=latent, steps=8)["samples"] - latent["samples"]).abs()
    white, grey, black = (moved[..., part].mean() for part in (slice(0, 6), slice(6, 10), slice(10, 16)))
    assert black < KEPT < 0.01 < grey < white


def test_outpainting_with_comfyui_own_nodes(host, tiny, draw):
    pad = {"left": 32, "top": 0, "right": 0, "bottom": 16, "feathering": 0}
    image, mask = host.run("ImagePadForOutpaint", image=torch.rand(1, 64, 64, 3), **pad)
    (latent,) = host.run("VAEEncode", pixels=image, vae=tiny.vae)
    (latent,) = host.run("SetLatentNoiseMask", samples=latent, mask=mask)
    got, given = draw(latent=latent)["samples"], latent["samples"]
    assert got.shape == (1, 128, 5, 6)
    torch.testing.assert_close(got[..., :4, 2:], given[..., :4, 2:], rtol=0, atol=KEPT)
    for border in (got[..., :2] - given[..., :2], got[..., 4, :] - given[..., 4, :]):
        assert border.abs().amax(1).min() > 0.01


@pytest.mark.parametrize(
    "node_id, settings",
    [
        ("LatentUpscaleBy", {"scale_by": 1.5}),
        # It takes a latent's pixel for 8 of the picture's, where Lens has 16.
        ("LatentUpscale", {"width": 48, "height": 72, "crop": "disabled"}),
    ],
)
def test_second_pass_has_the_larger_sizes_schedule(host, tiny, draw, node_id, settings):
    model, recorder = recorded(tiny.model)
    first = draw(model=model, cfg=1.0)
    (larger,) = host.run(node_id, samples=first, upscale_method="bilinear", **settings)
    assert larger["samples"].shape == (1, 128, 9, 8 if "width" in settings else 6)
    tokens = larger["samples"][0, 0].numel()
    recorder.calls.clear()
    draw(model=model, latent=larger, steps=4, cfg=1.0, denoise=0.5)
    want = sigmas(8, tokens)[4:-1].tolist()
    assert [call.sigma for call in recorder.calls] == pytest.approx(want, abs=1e-7)
    assert want != pytest.approx(sigmas(8, 24)[4:-1].tolist(), abs=1e-4), "both sizes have one schedule"


def test_second_pass_over_the_picture(tiny, draw, encode):
    """Decoded and encoded again larger: the next base's size, and its schedule."""
    pictures = tiny.vae.decode(draw()["samples"])
    latent, fitted, _ = encode(pictures)
    assert fitted.shape[1:3] == bucket(256, "2:3")
    model, recorder = recorded(tiny.model)
    draw(model=model, latent=latent, steps=2, cfg=1.0, denoise=0.5)
    want = sigmas(4, fitted.shape[1] * fitted.shape[2] // 256)[2:-1].tolist()
    assert [call.sigma for call in recorder.calls] == pytest.approx(want, abs=1e-7)


@pytest.fixture
def noise(host):
    """NOISE [B, 128, 6, 4] of LensNoise."""

    def draw(pictures: int = 1, **inputs):
        (source,) = host.run("LensNoise", **inputs)
        return source.generate_noise({"samples": torch.zeros(pictures, 128, *GRID)})

    return draw


@pytest.mark.parametrize("kind", ["host", "reference"])
def test_variations_go_from_one_seed_to_the_other(draw, noise, host, kind):
    ends = [draw(seed=seed, noise=kind)["samples"] for seed in (3, 4)]
    pictures = []
    for strength in (0.0, 0.2, 0.5, 1.0):
        (source,) = host.run("LensNoise", seed=3, variation_seed=4, variation_strength=strength, noise=kind)
        pictures.append(draw(seed=99, noise="host", custom_noise=source)["samples"])
    assert torch.equal(pictures[0], ends[0]) and torch.equal(pictures[-1], ends[1])
    distances = [relative_l2(picture, ends[0]) for picture in pictures]
    assert distances == sorted(distances) and distances[1] > 0.01


@pytest.mark.parametrize("kind", ["host", "reference"])
def test_pictures_of_a_batch_have_seeds_of_their_own(noise, kind):
    together = noise(3, seed=7, noise=kind)
    seeds = noise(3, seed=7, noise=kind, batch="consecutive seeds")
    for row in range(3):
        assert torch.equal(seeds[row : row + 1], noise(seed=7 + row, noise=kind))
    assert not torch.equal(seeds[1], together[1])
    vary = {"variation_seed": 20, "variation_strength": 0.3, "noise": kind}
    variations = noise(3, seed=7, batch="consecutive variations", **vary)
    for row in range(3):
        alone = noise(seed=7, **{**vary, "variation_seed": 20 + row})
        assert torch.equal(variations[row : row + 1], alone)


def test_a_picture_of_consecutive_seeds_is_the_one_drawn_alone(host, draw):
    (source,) = host.run("LensNoise", seed=2**64 - 1, batch="consecutive seeds", noise="host")
    both = {"samples": torch.zeros(2, 128, *GRID)}
    pictures = draw(latent=both, custom_noise=source)["samples"]
    # Matrix products over another batch round otherwise.
    for row, seed in enumerate((2**64 - 1, 0)):
        assert relative_l2(pictures[row : row + 1], draw(seed=seed)["samples"]) < 1e-5
    second = {"samples": torch.zeros(1, 128, *GRID), "batch_index": [1]}
    assert torch.equal(draw(latent=second, custom_noise=source)["samples"], draw(seed=0)["samples"])
