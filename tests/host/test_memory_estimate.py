"""The node that tells what a picture takes: its figures are those that the command line plans with."""

from __future__ import annotations

import re

import pytest
import torch

from lens_core.denoiser_places import DenoiserPlaces
from lens_core.loading import load_denoiser, load_vae, open_encoder
from lens_core.memory.plan import Plan
from lens_core.needs import Picture
from lens_core.residence import Residence
from lens_core.text_encoder import TextEncoder
from tests.host.helpers import random_latent

LATENT = {"samples": random_latent(1, (64, 48))}
SETTINGS = {"steps": 4, "text_tokens": 100}


@pytest.fixture
def estimate(host, tiny):
    """The node's text."""

    def run(**inputs) -> str:
        models = {"model": tiny.model, "clip": tiny.clip, "vae": tiny.vae, "latent": LATENT}
        (text,) = host.run("LensMemoryEstimate", **{**models, **SETTINGS, "vram_gb": 0.0, **inputs})
        return text

    return run


def test_figures_are_the_command_lines(estimate, tiny_folder):
    text = TextEncoder(open_encoder(tiny_folder), torch.float32)
    denoiser, vae = load_denoiser(tiny_folder, torch.float32), load_vae(tiny_folder, torch.float32)
    residence = Residence(text, denoiser, vae, torch.device("cpu:0"))
    assert isinstance(residence.places, DenoiserPlaces)
    parts = residence.components(Picture(64 * 16, 48 * 16, 1, 100, 4))
    whole = Plan(len(parts.encoder.layers), len(parts.denoiser.layers), True, True, True)
    peaks = whole.peaks(parts)
    figures = ", ".join(f"{phase} {size / 1e9:.2f}" for phase, size in peaks.items())
    assert f"All models stay: {max(peaks.values()) / 1e9:.2f} GB ({figures})" in estimate()


def test_says_what_it_is_for(estimate):
    assert estimate().startswith("1 x 768x1024, 4 steps, 100 text tokens\n")
    assert estimate(latent={"samples": random_latent(3, (4, 4))}).startswith("3 x 64x64, ")


def test_larger_pictures_and_batches_take_more(estimate):
    def peaks(**inputs) -> list[float]:
        return [float(value) for value in re.findall(r": ([\d.]+) GB \(", estimate(**inputs))]

    small = peaks(latent={"samples": random_latent(1, (16, 16))})
    large = peaks(latent={"samples": random_latent(1, (90, 90))})
    assert len(small) == 3 and all(a < b for a, b in zip(small, large, strict=True))
    assert peaks() == sorted(peaks(), reverse=True), "from all staying to streamed"


def test_a_budget_is_planned_for(estimate):
    assert "In 100.0 GB: encoder resident, stays; denoiser resident, modulation resident, stays" in estimate(
        vram_gb=100.0
    )
    assert re.search(
        r"In 0\.2 GB: CUDA out of memory: .* GB at least .* 0\.\d GB are there", estimate(vram_gb=0.2)
    )
    assert "In " not in estimate(), "there is no GPU here to plan for"


def test_nothing_is_loaded(estimate, tiny, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", None)
    monkeypatch.setattr(type(tiny.clip.cond_stage_model.text), "read", None)
    assert "All models stay" in estimate()


def test_other_loaders_models_are_named(estimate, tiny):
    with pytest.raises(Exception, match=r"NoneType is not this pack's\. Connect LensModelLoader"):
        estimate(vae=None)
    with pytest.raises(Exception, match=r"LensHostVAE is not this pack's"):
        estimate(clip=tiny.vae)
