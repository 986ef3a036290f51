"""LensSampler, its parts in SamplerCustomAdvanced, stock KSampler, ComfyUI's own Lens and lens_core's
pipeline agree with each other over the same weights."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch

from lens_core.loading import load_denoiser
from lens_core.pipeline import LensPipeline
from lens_core.sampling import (
    empirical_mu,
    euler,
    norm_rescaled_guidance,
    reference_noise,
    sigmas,
    tokens_to_grid,
)
from tests.compare import relative_l2
from tests.host.helpers import random_latent

GRID = (6, 4)
EMPTY = {"samples": torch.zeros(1, 128, *GRID)}
# Two or three steps of the same fp32 arithmetic in another order. Measured: 9e-7 at most.
SAME = 1e-5


@pytest.fixture(scope="module")
def network(tiny_folder):
    """lens_core's plain denoiser."""
    return load_denoiser(tiny_folder, torch.float32)


@pytest.fixture
def run_parts(host, tiny):
    """SamplerCustomAdvanced over our parts."""

    def run(noise, latent, steps=2, cfg=5.0, denoise=1.0, model=None):
        conditioning = {"positive": tiny.positive, "negative": tiny.negative}
        (guider,) = host.run("LensGuider", model=model or tiny.model, cfg=cfg, **conditioning)
        (levels,) = host.run("LensScheduler", steps=steps, latent=latent, denoise=denoise)
        (sampler,) = host.run("KSamplerSelect", sampler_name="euler")
        latents = host.run(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=sampler,
            sigmas=levels,
            latent_image=latent,
        )
        return latents[0]["samples"]

    return run


def walk(network, tiny, start, levels, cfg):
    """A hand-written Euler loop over [B, 128, h, w], guided along the channels."""
    config = network.config
    grid = tuple(start.shape[-2:])

    def velocity(x, sigma, features):
        text = features.unflatten(-1, (config.num_text_layers, config.enc_hidden_dim))
        tokens = x.flatten(2).transpose(1, 2)
        return tokens_to_grid(network(tokens, sigma.expand(1), text, grid), grid)

    x = start
    for sigma, following in pairwise(levels):
        cond = velocity(x, sigma, tiny.positive[0][0])
        uncond = velocity(x, sigma, tiny.negative[0][0])
        x = x + (following - sigma) * norm_rescaled_guidance(cond, uncond, cfg, dim=1)
    return x


def test_stock_ksampler_is_norm_rescaled_euler(tiny, network, ksampler):
    import comfy.sample
    import comfy.samplers

    levels = comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "simple", 3)
    noise = comfy.sample.prepare_noise(EMPTY["samples"], 1)
    want = walk(network, tiny, levels[0] * noise, levels, 5.0)
    got = ksampler(steps=3)
    assert relative_l2(got, want) < SAME
    plain = walk(network, tiny, levels[0] * noise, levels, 1.0)
    assert relative_l2(got, plain) > 0.1, "guidance changes nothing"


@pytest.mark.parametrize(
    "sampler, scheduler", [("dpmpp_2m", "sgm_uniform"), ("euler_ancestral", "beta"), ("uni_pc", "normal")]
)
def test_other_stock_samplers_run(ksampler, sampler, scheduler):
    latents = ksampler(steps=4, sampler_name=sampler, scheduler=scheduler)
    assert latents.shape == EMPTY["samples"].shape
    assert latents.isfinite().all() and latents.std() > 0.1


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_parts_equal_the_sampler_with_reference_noise(host, draw, run_parts, cfg):
    (noise,) = host.run("LensNoise", seed=3)
    want = draw(seed=3, cfg=cfg, noise="reference")["samples"]
    assert torch.equal(run_parts(noise, EMPTY, cfg=cfg), want)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_parts_equal_the_sampler_with_host_noise(host, draw, run_parts, cfg):
    (noise,) = host.run("RandomNoise", noise_seed=3)
    want = draw(seed=3, cfg=cfg, noise="host")["samples"]
    assert torch.equal(run_parts(noise, EMPTY, cfg=cfg), want)


def test_parts_take_another_models_empty_latent(host, draw, run_parts):
    """EmptyLatentImage's 4 channels at an eighth become 128 at a sixteenth."""
    (latent,) = host.run("EmptyLatentImage", width=64, height=96, batch_size=1)
    for kind, node in (("host", "RandomNoise"), ("reference", "LensNoise")):
        (noise,) = host.run(node, **{"noise_seed" if kind == "host" else "seed": 1})
        want = draw(noise=kind)["samples"]
        got = draw(noise=kind, latent=latent)
        assert torch.equal(got["samples"], want)
        assert got.keys() == {"samples"}, "the ratio of the other model's latent is gone"
        assert torch.equal(run_parts(noise, latent), want)


def test_reference_noise_is_the_published_programs(host, tiny):
    """Drawn in bf16 token by token for the whole batch, then laid out as a picture."""
    (noise,) = host.run("LensNoise", seed=7)
    got = noise.generate_noise({"samples": torch.zeros(2, 128, *GRID)})
    tokens = torch.randn(2, 24, 128, generator=torch.Generator().manual_seed(7), dtype=torch.bfloat16)
    assert got.dtype == torch.float32 and got.shape == (2, 128, *GRID)
    for batch, row, column in ((0, 0, 0), (1, 5, 3), (0, 2, 1)):
        assert torch.equal(got[batch, :, row, column], tokens[batch, row * GRID[1] + column].float())


def test_sampler_equals_the_pipeline(tiny, draw, tiny_folder):
    """lens_core's pipeline with the same noise: the reference's loop, without ComfyUI."""
    steps = 4
    pipeline = LensPipeline.from_folder(tiny_folder, torch.device("cpu"), torch.float32)
    noise = reference_noise(5, 1, 24, 128, torch.bfloat16, "cpu").float()
    velocity = partial(
        pipeline.velocity,
        positive=pipeline.denoiser.embed_text(pipeline.features("a red circle")),
        negative=pipeline.denoiser.embed_text(pipeline.empty_features()),
        cfg=5.0,
        grid=GRID,
    )
    want = tokens_to_grid(euler(velocity, noise, sigmas(steps, 24)), GRID)
    got = draw(seed=5, steps=steps, noise="reference")["samples"]
    # The same fp32 arithmetic over four steps; measured: 7e-7.
    assert relative_l2(got, want) < SAME
    # And the pictures: bytes are cut off, so a value on the edge may fall on either side.
    pictures = pipeline("a red circle", noise=noise, size=(96, 64), steps=steps, cfg=5.0)
    decoded = (tiny.vae.decode(got) * 255).to(torch.uint8)
    assert (decoded.int() - pictures.int()).abs().max() <= 1


def test_comfyui_own_model_draws_the_same(host, draw, tiny, stock_model):
    """A UNETLoader MODEL gets Lens' guidance in LensSampler, and keeps its own elsewhere."""
    assert type(stock_model.model).__name__ == "Lens"
    want = draw(seed=2)["samples"]
    assert relative_l2(draw(seed=2, model=stock_model)["samples"], want) < SAME
    assert "sampler_cfg_function" not in stock_model.model_options, "the node changed its input"


def test_guidance_of_another_node_is_kept(host, draw, tiny):
    """CFGNorm replaces the guidance; the node before the sampler has the last word."""
    (patched,) = host.run("CFGNorm", model=tiny.model, strength=0.0, pre_cfg=True)
    plain = draw(model=patched)["samples"]
    assert relative_l2(plain, draw()["samples"]) > 0.05
    (full,) = host.run("CFGNorm", model=tiny.model, strength=1.0, pre_cfg=True)
    assert relative_l2(draw(model=full)["samples"], draw()["samples"]) < SAME


def test_stock_shift_node_patches_our_model(host, tiny, ksampler):
    """ModelSamplingFlux replaces the schedule; with our own shift it changes nothing."""
    size = {"width": 1024, "height": 1024}
    shift = empirical_mu(4096, 20)
    (same,) = host.run("ModelSamplingFlux", model=tiny.model, max_shift=shift, base_shift=shift, **size)
    (other,) = host.run("ModelSamplingFlux", model=tiny.model, max_shift=0.5, base_shift=0.5, **size)
    assert torch.equal(ksampler(model=same), ksampler())
    assert relative_l2(ksampler(model=other), ksampler()) > 0.01
    assert torch.equal(ksampler(), ksampler(model=tiny.model)), "the patch left its clone"


@pytest.mark.parametrize("name, steps", [("Lens-tiny", 20), ("Lens-Turbo-tiny", 4)])
def test_default_schedule_is_that_of_1024_pixels(host, name, steps):
    """BasicScheduler with "simple" gives LensScheduler's levels at 1024 x 1024, to its table's fp32."""
    model, *_ = host.run("LensModelLoader", model_name=name, dtype="float32")
    (stock,) = host.run("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)
    latent = {"samples": torch.zeros(1, 128, 64, 64)}
    (ours,) = host.run("LensScheduler", steps=steps, latent=latent, denoise=1.0)
    assert torch.equal(ours, sigmas(steps, 4096))
    torch.testing.assert_close(stock, ours, rtol=0, atol=2e-7)


def test_batch_and_batch_index(host, draw, run_parts):
    """A picture of a batch is drawn again alone by its index, with either noise; matrix products over
    another batch round otherwise."""
    both = {"samples": torch.zeros(2, 128, *GRID)}
    second = {"samples": torch.zeros(1, 128, *GRID), "batch_index": [1]}
    for noise in ("host", "reference"):
        batch = draw(latent=both, noise=noise)["samples"]
        assert relative_l2(batch[0], batch[1]) > 0.1, "twice the same picture"
        alone = draw(latent=second, noise=noise)
        assert relative_l2(alone["samples"], batch[1:]) < SAME
        assert alone["batch_index"] == [1]
    (noise,) = host.run("LensNoise", seed=1)
    assert torch.equal(run_parts(noise, second), alone["samples"])


def test_latents_keep_their_other_keys(draw):
    latent = {"samples": random_latent(1, GRID), "noise_mask": torch.ones(1, 1, 96, 64), "mine": 3}
    out = draw(latent=latent)
    assert out.keys() == latent.keys() and out["mine"] == 3
    assert latent["samples"] is not out["samples"], "the input was overwritten"


def test_same_seed_same_picture(draw):
    assert torch.equal(draw()["samples"], draw()["samples"])
    assert relative_l2(draw(seed=2)["samples"], draw()["samples"]) > 0.1
