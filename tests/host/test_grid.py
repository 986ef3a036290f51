"""LensGrid: its pictures are LensSampler's, prompts are encoded once, models loaded once, Cancel stops it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.host.conftest import Tiny

LENS, TURBO = "lens_tiny_bf16.safetensors", "lens_turbo_tiny_bf16.safetensors"
PROMPTS, SEEDS = ("a red circle", "two blue squares"), (3, 8)
SIZE = (176, 352)


@pytest.fixture
def grid(host, tiny: Tiny) -> Callable[..., tuple]:
    """LensGrid with two prompts and two seeds by two checkpoints, one step each; arguments replace inputs."""

    def run(**changes: Any) -> tuple:
        inputs = {
            "clip": tiny.clip,
            "vae": tiny.vae,
            "prompts": "\n".join(PROMPTS),
            "negative": "",
            "seeds": "3, 8",
            "base_resolution": "256",
            "aspect_ratio": "2:1",
            "checkpoint_1": TURBO,
            "checkpoint_2": LENS,
            "steps": 1,
        }
        return host.run("LensGrid", **{**inputs, **changes})

    return run


@pytest.fixture
def loads(host, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files of denoisers in the order in which they are read."""
    shelf, seen = host.module("nodes.host.shelf"), []
    load = shelf.load_model

    def noted(path, *rest: Any, **more: Any):
        seen.append(path.name)
        return load(path, *rest, **more)

    monkeypatch.setattr(shelf, "load_model", noted)
    return seen


def drawn_alone(
    host, tiny: Tiny, name: str, prompt: str, seed: int, steps: int = 1, **inputs
) -> torch.Tensor:
    """The same picture by the loader, LensTextEncode, LensSampler and LensVAEDecode."""
    model, own_steps, cfg = host.run("LensModelLoader", model_name=name, dtype="auto", **inputs)
    positive, negative = host.run("LensTextEncode", clip=tiny.clip, prompt=prompt, negative="")
    latent, *_ = host.run("LensEmptyLatent", base_resolution="256", aspect_ratio="2:1", batch_size=1)
    settings = {"seed": seed, "steps": steps or own_steps, "cfg": cfg, "noise": "host", "denoise": 1.0}
    conditioning = {"positive": positive, "negative": negative}
    (drawn,) = host.run("LensSampler", model=model, **conditioning, latent=latent, **settings)
    return host.run("LensVAEDecode", latent=drawn, vae=tiny.vae)[0]


def test_each_picture_is_the_samplers_bit_for_bit(host, tiny: Tiny, grid, loads: list[str]):
    sheet, images, labels = grid()
    assert loads == [TURBO, LENS], "each checkpoint once, in their order"
    assert images.shape == (8, *SIZE, 3) and images.device.type == "cpu"
    lines = labels.splitlines()
    assert len(lines) == 8
    for number in (1, 4, 7):
        name, prompt, seed = (TURBO, LENS)[number // 4], PROMPTS[number // 2 % 2], SEEDS[number % 2]
        assert torch.equal(images[number], drawn_alone(host, tiny, name, prompt, seed)[0])
        assert lines[number].startswith(name.removesuffix(".safetensors"))
        assert lines[number].endswith(f"seed {seed}: {prompt}")
    # Two columns of four; every picture is on it in full.
    assert sheet.shape[1] > 4 * SIZE[0] and sheet.shape[2] > 2 * SIZE[1]
    assert len({line.encode() for line in lines}) == 8 and not torch.equal(images[0], images[4])


def test_steps_and_cfg_are_each_checkpoints_own_and_modes_are_drawn_apart(host, tiny: Tiny, grid):
    settings = {"prompts": PROMPTS[0], "seeds": "3", "checkpoint_2": "none", "steps": 0}
    _, images, labels = grid(**settings, quantizations="none, int8_weight_only")
    assert [line.partition(", seed")[0] for line in labels.splitlines()] == [
        "lens_turbo_tiny_bf16, 4 steps, cfg 1",
        "lens_turbo_tiny_bf16 (int8_weight_only), 4 steps, cfg 1",
    ]
    assert torch.equal(images[0], drawn_alone(host, tiny, TURBO, PROMPTS[0], 3, steps=0)[0])
    quantized = {"steps": 0, "quantization": "int8_weight_only"}
    assert torch.equal(images[1], drawn_alone(host, tiny, TURBO, PROMPTS[0], 3, **quantized)[0])


def test_a_connected_model_is_drawn_first_and_nothing_is_loaded_for_it(tiny: Tiny, grid, loads: list[str]):
    none = {"checkpoint_1": "none", "checkpoint_2": "none", "prompts": PROMPTS[0]}
    model = tiny.model.clone()
    _, _, labels = grid(model=model, **none, seeds="3", steps=0, cfg=1.0)
    assert not loads and labels.splitlines()[0] == "Lens-tiny, 20 steps, cfg 1, seed 3: a red circle"
    weight = next(iter(model.model_state_dict()))
    model.add_patches({weight: (torch.zeros_like(model.model_state_dict()[weight]),)}, 1.0)
    _, _, labels = grid(model=model, **{**none, "checkpoint_1": TURBO}, seeds="3", cfg=1.0)
    assert loads == [TURBO]
    assert [line.partition(",")[0] for line in labels.splitlines()] == [
        "Lens-tiny + LoRA",
        "lens_turbo_tiny_bf16",
    ]


def test_each_prompt_is_encoded_once(host, tiny: Tiny, grid, monkeypatch: pytest.MonkeyPatch):
    texts = []
    tokenize = tiny.clip.tokenize

    def noted(text: str, **options: Any):
        texts.append(text)
        return tokenize(text, **options)

    monkeypatch.setattr(tiny.clip, "tokenize", noted)
    grid(negative="blurred", seeds="3", checkpoint_2="none")
    assert texts == [*PROMPTS, "blurred"]


def test_the_bar_counts_all_pictures_with_previews(grid, progress: list):
    grid(steps=2, prompts=PROMPTS[0], checkpoint_2="none")
    steps = [(done, total) for done, total, preview in progress if preview is not None]
    assert steps == [(done, 4) for done in range(1, 5)]
    assert progress[-1][:2] == (2, 2), "then the pictures that are decoded"


@pytest.mark.parametrize("done, total", [(2, 4), (1, 2)], ids=["while sampling", "while decoding"])
def test_cancel_stops_at_once(host, management, grid, progress: list, done: int, total: int):
    """Two pictures of two steps, then the two that are decoded."""
    import comfy.utils

    noted = comfy.utils.PROGRESS_BAR_HOOK

    def cancelling(*report: Any, **node: Any) -> None:
        noted(*report, **node)
        if report[:2] == (done, total):
            management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(cancelling)
    with pytest.raises(management.InterruptProcessingException):
        grid(steps=2, prompts=PROMPTS[0], checkpoint_2="none")
    assert progress[-1][:2] == (done, total), "nothing was done after it"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": "a lot"}, "Expected whole numbers and ranges"),
        ({"prompts": "\n"}, "There is no prompt"),
        ({"seeds": "1-100"}, "2 models x 2 prompts x 100 seeds are 400 pictures"),
        ({"checkpoint_2": "lens_gone.safetensors"}, "There is no denoiser 'lens_gone.safetensors'"),
        ({"quantizations": "none, int3"}, "quantizations is 'int3'; expected one of none, auto"),
        ({"columns": "steps"}, "columns is 'steps'"),
        ({"checkpoint_1": "none", "checkpoint_2": "none"}, "There is no model to draw with"),
        ({"clip": None}, "No text encoder arrived"),
        ({"vae": None}, "No VAE arrived"),
        ({"base_resolution": "300"}, "base_resolution must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_before_anything_runs(
    host, tiny, grid, loads, monkeypatch, changes: dict[str, Any], message: str
):
    monkeypatch.setattr(tiny.clip, "tokenize", None)
    with pytest.raises(host.module("lens_core.errors").LensError, match=re.escape(message)):
        grid(**changes)
    assert not loads


def test_a_missing_checkpoint_is_named_before_the_prompt_starts(host):
    node = host.node_classes["LensGrid"]
    assert node.validate_inputs(checkpoint_1="none", checkpoint_2=TURBO) is True
    answer = node.validate_inputs(checkpoint_1=TURBO, checkpoint_3="lens_gone.safetensors")
    assert "There is no denoiser 'lens_gone.safetensors'" in answer


def test_a_changed_file_is_drawn_again(host):
    node = host.node_classes["LensGrid"]
    stamps = node.fingerprint_inputs(checkpoint_1=TURBO, checkpoint_2="none", prompts="a")
    assert len(stamps) == 4 and stamps[0] and not any(stamps[1:])
