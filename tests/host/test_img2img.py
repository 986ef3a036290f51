"""Starting from a picture's latent: denoise below 1, and masks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lens_core.sampling import sigmas
from tests.compare import relative_l2
from tests.host.helpers import random_latent, recorded

GRID = (6, 4)
TOKENS = 24
# Two steps of the same fp32 arithmetic in another order; measured: below 1e-6.
SAME = 1e-5


def picture(seed: int = 4) -> dict:
    return {"samples": random_latent(1, GRID, seed)}


def test_denoise_zero_changes_nothing(tiny, draw):
    model, recorder = recorded(tiny.model)
    latent = picture()
    assert torch.equal(draw(model=model, latent=latent, denoise=0.0)["samples"], latent["samples"])
    assert not recorder.calls


@pytest.mark.parametrize("denoise, total", [(1.0, 4), (0.5, 8), (0.8, 5), (0.1, 40)])
def test_denoise_runs_the_end_of_a_longer_schedule(tiny, draw, denoise, total):
    """Always ``steps`` forwards, at the last levels of a schedule of steps / denoise."""
    model, recorder = recorded(tiny.model)
    draw(model=model, latent=picture(), steps=4, cfg=1.0, denoise=denoise)
    want = sigmas(total, TOKENS)[-5:-1].tolist()
    assert [call.sigma for call in recorder.calls] == pytest.approx(want, abs=1e-7)


def test_start_is_latent_and_noise_mixed(tiny, draw):
    """Against a hand-written loop over the network inside MODEL."""
    import comfy.sample

    latent = picture()["samples"]
    levels = sigmas(6, TOKENS)[-4:]
    noise = comfy.sample.prepare_noise(latent, 1)
    x = levels[0] * noise + (1 - levels[0]) * latent
    for sigma, following in pairwise(levels):
        velocity = tiny.model.model.diffusion_model(x, sigma.expand(1), tiny.positive[0][0])
        x = x + (following - sigma) * velocity
    got = draw(latent=picture(), steps=3, cfg=1.0, denoise=0.5)["samples"]
    assert relative_l2(got, x) < SAME


@pytest.mark.parametrize("kind", ["host", "reference"])
def test_parts_equal_the_sampler(host, tiny, draw, kind):
    node, key = {"host": ("RandomNoise", "noise_seed"), "reference": ("LensNoise", "seed")}[kind]
    (noise,) = host.run(node, **{key: 1})
    (guider,) = host.run(
        "LensGuider", model=tiny.model, positive=tiny.positive, negative=tiny.negative, cfg=5.0
    )
    (levels,) = host.run("LensScheduler", steps=2, latent=picture(), denoise=0.5)
    (sampler,) = host.run("KSamplerSelect", sampler_name="euler")
    out, denoised = host.run(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampler,
        sigmas=levels,
        latent_image=picture(),
    )
    want = draw(latent=picture(), noise=kind, denoise=0.5)["samples"]
    assert torch.equal(out["samples"], want)
    # The last step ends at sigma 0, on the last prediction of the picture itself.
    assert relative_l2(denoised["samples"], want) < 1e-6


def test_less_denoise_stays_nearer(draw):
    latent = picture()["samples"]
    distances = [
        relative_l2(draw(latent=picture(), steps=4, denoise=denoise)["samples"], latent)
        for denoise in (0.1, 0.4, 1.0)
    ]
    assert distances == sorted(distances) and distances[0] < distances[2] / 2


@pytest.mark.parametrize("shape", [(1, 1, 96, 64), (1, *GRID)])
def test_mask_keeps_the_rest(host, draw, shape):
    """Masked out latents come back; a mask may have the picture's size or the latent's."""
    latent = picture()
    mask = torch.zeros(shape)
    mask[..., shape[-1] // 2 :] = 1
    (masked,) = host.run("SetLatentNoiseMask", samples=latent, mask=mask)
    got = draw(latent=masked, steps=3)["samples"]
    left, right = got[..., :2], got[..., 2:]
    # x + (denoised - x) / sigma * sigma is denoised up to fp32 rounding.
    torch.testing.assert_close(left, latent["samples"][..., :2], rtol=0, atol=1e-6)
    assert relative_l2(right, latent["samples"][..., 2:]) > 0.1


def test_mask_with_reference_noise_and_partial_denoise(draw):
    latent = {**picture(), "noise_mask": torch.zeros(1, 1, *GRID)}
    got = draw(latent=latent, noise="reference", denoise=0.5)["samples"]
    torch.testing.assert_close(got, latent["samples"], rtol=0, atol=1e-6)


def test_from_picture_to_picture(host, tiny, draw):
    """VAEEncode, half the noise, LensVAEDecode."""
    pixels = torch.rand(1, 96, 64, 3)
    (latent,) = host.run("VAEEncode", pixels=pixels, vae=tiny.vae)
    assert latent["samples"].shape == (1, 128, *GRID)
    (image,) = host.run("LensVAEDecode", latent=draw(latent=latent, denoise=0.5), vae=tiny.vae)
    assert image.shape == pixels.shape and 0 <= image.min() < image.max() <= 1
