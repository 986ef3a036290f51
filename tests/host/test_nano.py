"""Nano Lens in ComfyUI: the pack's own models are listed, and every node takes their sizes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lens_core.pipeline import LensPipeline
from lens_core.sampling import empirical_mu, sigmas
from lens_core.tiny.models import lora_weights
from tests.compare import relative_l2
from tests.host.conftest import PROMPT, Tiny
from tests.host.helpers import recorded
from tests.host.test_nodes import choices
from tools.nano.configs import DENOISER

LENS, TURBO = "Example/lens", "Example/lens-turbo"  # sorted before Lens-tiny
SIZE, GRID, CHANNELS = (208, 320), (13, 20), 32
# The same fp32 arithmetic over four guided steps. Measured: 1e-6.
SAME = 1e-5


@pytest.fixture(scope="module", autouse=True)
def brought_along(host, nano_models: Path) -> Iterator[None]:
    """The folder above the random nano models, as if they were the pack's own."""
    import folder_paths

    # In place: other fixtures add folders to the same list meanwhile.
    roots, _ = folder_paths.folder_names_and_paths["lens"]
    roots.append(str(nano_models.parent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.module("nodes.host.paths"), "_BROUGHT_ALONG", nano_models.parent)
        yield
    roots.remove(str(nano_models.parent))


@pytest.fixture(scope="module")
def nano(host, brought_along) -> Tiny:
    """Loaded once, in fp32; patch a ``model.clone()``, never the model itself."""
    with torch.inference_mode():
        model, *_ = host.run("LensModelLoader", model_name=LENS, dtype="float32")
        (clip,) = host.run("LensEncoderLoader", encoder_name=LENS, feature_cache=False)
        (vae,) = host.run("LensVAELoader", vae_name=LENS)
        positive, negative = host.run("LensTextEncode", clip=clip, prompt=PROMPT, negative="")
    return Tiny(model, clip, vae, positive, negative)


@pytest.fixture
def sample(host, nano: Tiny):
    """LensSampler on an empty latent of 13 x 20 tokens, four steps at cfg 5; arguments replace inputs."""

    def run(**changes: Any) -> torch.Tensor:
        inputs = {
            "model": nano.model,
            "positive": nano.positive,
            "negative": nano.negative,
            "latent": {"samples": torch.zeros(1, 128, *GRID)},
            "seed": 5,
            "steps": 4,
            "cfg": 5.0,
            "noise": "reference",
            "denoise": 1.0,
        }
        (latent,) = host.run("LensSampler", **{**inputs, **changes})
        return latent["samples"]

    return run


@pytest.mark.parametrize("node_id", ["LensModelLoader", "LensEncoderLoader", "LensVAELoader"])
def test_the_packs_models_are_listed_last(host, node_id: str):
    names = [name.replace("\\", "/") for name in choices(host, node_id)]
    own = [LENS, TURBO] if node_id == "LensModelLoader" else [LENS]
    assert names[-len(own) :] == own
    assert "Lens-tiny" in names


def test_variants_bring_their_settings(host):
    for name, settings in ((LENS, (20, 5.0)), (TURBO, (4, 1.0))):
        assert host.run("LensModelLoader", model_name=name, dtype="auto")[1:] == settings


def test_no_other_encoder_is_given_the_nano_tokenizer(host, nano_models: Path, tiny_folder: Path):
    places = host.module("nodes.host.paths").tokenizer_places()
    assert tiny_folder / "tokenizer" in places
    assert not [place for place in places if place.is_relative_to(nano_models.parent)]


def test_the_sampler_equals_the_pipeline(nano: Tiny, nano_models: Path, sample):
    """An empty latent of 128 channels gets the model's; the pipeline draws without ComfyUI."""
    pipeline = LensPipeline.from_folder(nano_models / "lens", torch.device("cpu"), torch.float32)
    caught = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents: decode(caught.append(latents) or latents)
    pipeline.dtype = torch.bfloat16  # of the noise, as LensNoise draws it
    noise = pipeline.noise(5, 1, SIZE).float()
    pipeline.dtype = torch.float32
    picture = pipeline(PROMPT, noise=noise, size=SIZE, steps=4, cfg=5.0)
    got = sample()
    assert got.shape == (1, CHANNELS, *GRID)
    assert relative_l2(got, caught[0]) < SAME
    decoded = (nano.vae.decode(got) * 255).to(torch.uint8)
    assert (decoded.int() - picture.int()).abs().max() <= 1


def test_stock_nodes(host, nano: Tiny):
    """ComfyUI's own latent, sampler and decoder; its schedule is that of the nano model's own size."""
    (empty,) = host.run("EmptyLatentImage", width=SIZE[1], height=SIZE[0], batch_size=1)
    model, recorder = recorded(nano.model)
    (latent,) = host.run(
        "KSampler",
        model=model,
        seed=1,
        steps=4,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        positive=nano.positive,
        negative=nano.negative,
        latent_image=empty,
        denoise=1.0,
    )
    assert latent["samples"].shape == (1, CHANNELS, *GRID)
    assert nano.model.get_model_object("model_sampling").shift == pytest.approx(empirical_mu(256, 20))
    assert recorder.calls[0].sigma == pytest.approx(1.0)
    (stock,), (ours,) = (host.run(node, vae=nano.vae, **{key: latent}) for node, key in DECODERS)
    assert torch.equal(stock, ours) and stock.shape == (1, *SIZE, 3)


DECODERS = (("VAEDecode", "samples"), ("LensVAEDecode", "latent"))


def test_from_picture_to_picture(host, nano: Tiny, sample):
    pixels = torch.rand(1, *SIZE, 3)
    (latent,) = host.run("VAEEncode", pixels=pixels, vae=nano.vae)
    assert latent["samples"].shape == (1, CHANNELS, *GRID)
    model, recorder = recorded(nano.model)
    got = sample(model=model, latent=latent, denoise=0.5, steps=2, cfg=1.0)
    levels = sigmas(4, GRID[0] * GRID[1])[-3:]
    assert [call.sigma for call in recorder.calls] == pytest.approx(levels[:-1].tolist(), abs=1e-6)
    (scheduled,) = host.run("LensScheduler", steps=2, latent=latent, denoise=0.5)
    assert torch.equal(scheduled, levels)
    assert relative_l2(got, latent["samples"]) > 0.01
    assert torch.equal(sample(latent=latent, denoise=0.0), latent["samples"])


@pytest.mark.parametrize("channels", [32, 128])
def test_a_picture_of_the_other_vae_is_refused(nano: Tiny, tiny: Tiny, sample, draw, channels: int):
    latent = {"samples": torch.randn(1, channels, 6, 4)}
    refuse = draw if channels == 32 else sample
    with pytest.raises(
        Exception, match=r"draws with .* Encode the picture with the VAE that belongs"
    ) as caught:
        refuse(latent=latent)
    assert type(caught.value).__name__ == "SettingError"


def test_the_other_vae_is_named(host, tiny: Tiny):
    latent = {"samples": torch.randn(1, CHANNELS, 6, 4)}
    with pytest.raises(
        Exception, match=r"decodes 128 channels.*Nano Lens' have 32: use the VAE in its folder"
    ):
        host.run("LensVAEDecode", latent=latent, vae=tiny.vae)


@pytest.mark.parametrize(("mode", "most"), [("int8_dynamic", 0.05), ("uint4_sdnq", 0.25)])
def test_quantised(host, sample, mode: str, most: float):
    """As far from bf16 as the tiny model (test_quantization.py); all modes: tests/core."""
    pictures = [
        sample(
            model=host.run("LensModelLoader", model_name=TURBO, dtype="bfloat16", quantization=each)[0],
            cfg=1.0,
        )
        for each in ("none", mode)
    ]
    assert 1e-4 < relative_l2(pictures[1], pictures[0]) < most


def test_a_lora_shows_and_is_saved_with_the_model(host, sample, own_models: Path, models: Path, caplog):
    lora = lora_weights(torch.Generator().manual_seed(0), DENOISER)
    save_file(lora, own_models / "loras" / "nano.safetensors")
    turbo, *_ = host.run("LensModelLoader", model_name=TURBO, dtype="float32")
    with caplog.at_level(logging.INFO):
        (patched,) = host.run("LensLoraLoader", model=turbo, lora_name="nano.safetensors", strength=0.5)
    assert "matched 40 of 40" in caplog.text
    got = sample(model=patched, cfg=1.0)
    assert relative_l2(got, sample(model=turbo, cfg=1.0)) > 0.01
    (saved,) = host.run("LensSaveModel", model=patched, file_name="merged", overwrite=False)
    merged, steps, cfg = host.run("LensModelLoader", model_name=saved, dtype="float32")
    assert (steps, cfg) == (4, 1.0)
    assert relative_l2(sample(model=merged, cfg=1.0), got) < SAME


def test_a_saved_vae_is_read_again(host, nano: Tiny, own_models: Path):
    save_file(nano.vae.get_sd(), own_models / "vae" / "nano_vae.safetensors")
    (again,) = host.run("LensVAELoader", vae_name="nano_vae.safetensors")
    latents = torch.randn(1, CHANNELS, 3, 2)
    assert torch.equal(again.decode(latents), nano.vae.decode(latents))


def test_the_doctor_and_the_estimate_know_it(host, nano: Tiny):
    (text,) = host.run(
        "LensDoctor", model=nano.model, clip=nano.clip, vae=nano.vae, files=TURBO, hash=False, parity=True
    )
    assert "a Lens denoiser, Lens-Turbo, BF16" in text and text.endswith("Result: nothing is broken.")
    assert "as ComfyUI's" in text
    latent = {"samples": torch.zeros(1, CHANNELS, *GRID)}
    inputs = {"steps": 20, "text_tokens": 40, "vram_gb": 8.0}
    (text,) = host.run(
        "LensMemoryEstimate", model=nano.model, clip=nano.clip, vae=nano.vae, latent=latent, **inputs
    )
    assert "320x208" in text and "In 8.0 GB" in text


def test_previews_have_the_colours_of_the_vae_beside_the_model(host, nano: Tiny, sample, progress: list):
    """Turbo has no VAE of its own and takes that of Lens' folder; a file with none beside it shows none."""
    sample()
    shown = [preview[1] for _, _, preview in progress if preview is not None]
    assert len(shown) == 4 and shown[0].size == (2 * GRID[1], 2 * GRID[0])
    turbo, *_ = host.run("LensModelLoader", model_name=TURBO, dtype="float32")
    own, others = (each.model.latent_format.latent_rgb_factors for each in (nano.model, turbo))
    assert own == others and len(own) == 8 and len(own[0]) == 3
    formats = host.module("nodes.host.model").PackedLatents
    assert formats(CHANNELS, Path("a file.safetensors")).latent_rgb_factors is None
    assert (
        formats(CHANNELS * 2, host.module("nodes.host.model").source_of(nano.model)).latent_rgb_factors
        is None
    )
