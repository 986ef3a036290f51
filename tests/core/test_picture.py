"""Whole tiny pictures: the pipeline against the line-by-line oracle, and what the comparison notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lens_core.denoiser import run
from lens_core.pipeline import LensPipeline
from lens_core.sampling import sigmas
from tests.compare import relative_l2
from tests.reference import straight_line

SIZE = (
    256,
    208,
)  # height, width; 16 x 13 tokens, so that neither rows and columns nor halves can be mixed
PROMPT = "a red circle on the blue square"
# fp32 with another order of summation in encoder, denoiser and guidance. One velocity is 4e-6 off (the time
# embedding's angles near 1000 radians); guidance of 5 amplifies the difference of two. Measured: 3e-6.
LATENTS = 1e-4
# Truncation turns any difference into one byte where a value lies on an integer.
BYTES = 1


@pytest.fixture
def pipeline(tiny_folder: Path) -> LensPipeline:
    return LensPipeline.from_folder(tiny_folder, torch.device("cpu"), torch.float32)


def draw(pipeline: LensPipeline, noise: Tensor, **settings: Any) -> tuple[np.ndarray, Tensor]:
    """The first picture of a batch and its latents [N, C], caught on their way into the VAE."""
    caught = []
    decode = pipeline.vae.decode

    def spy(latents: Tensor) -> Tensor:
        caught.append(latents)
        return decode(latents)

    pipeline.vae.decode = spy  # type: ignore[method-assign]
    images = pipeline(settings.pop("prompt", PROMPT), noise=noise, size=SIZE, steps=4, **settings)
    pipeline.vae.decode = decode  # type: ignore[method-assign]
    return images[0].numpy(), caught[0][0].flatten(1).T


def oracle(folder: Path, noise: Tensor, **settings: Any) -> tuple[np.ndarray, Tensor]:
    height, width = SIZE
    prompt = settings.pop("prompt", PROMPT)
    return straight_line.render(
        folder, prompt, height=height, width=width, steps=4, noise=noise[0], capture_latents=True, **settings
    )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"cfg": 5.0}, id="cfg 5"),
        pytest.param({"cfg": 5.0, "negative": "a green image"}, id="cfg 5 and a negative prompt"),
        pytest.param({"cfg": 5.0, "negative": " \n"}, id="cfg 5 and a blank negative prompt"),
        pytest.param({"cfg": 1.0}, id="cfg 1"),
        pytest.param({"cfg": 1.0, "negative": "a green image"}, id="cfg 1 leaves the negative prompt out"),
        pytest.param({"cfg": 2.5, "prompt": ""}, id="an empty prompt"),
    ],
)
def test_a_picture_equals_the_oracles(pipeline: LensPipeline, tiny_folder: Path, settings: dict[str, Any]):
    noise = pipeline.noise(3, 1, SIZE)
    picture, latents = draw(pipeline, noise, **settings)
    want_picture, want_latents = oracle(tiny_folder, noise, **settings)
    assert relative_l2(latents, want_latents) < LATENTS
    assert picture.shape == want_picture.shape == (*SIZE, 3)
    assert np.abs(picture.astype(int) - want_picture.astype(int)).max() <= BYTES


def test_pictures_of_a_batch_equal_pictures_alone(pipeline: LensPipeline):
    noise = pipeline.noise(3, 2, SIZE)
    both = pipeline(PROMPT, noise=noise, size=SIZE, steps=2, cfg=5.0).int()
    for index in range(2):
        alone = pipeline(PROMPT, noise=noise[index : index + 1], size=SIZE, steps=2, cfg=5.0).int()
        assert (both[index] - alone[0]).abs().max() <= BYTES


def shift_mu(monkeypatch: pytest.MonkeyPatch, pipeline: LensPipeline) -> None:
    """mu 1.15, FLUX's own at this size."""
    monkeypatch.setattr("lens_core.sampling.schedule.empirical_mu", lambda tokens, steps: 1.15)
    assert not torch.equal(sigmas(4, 208), torch.tensor(straight_line.schedule(208, 4)))


def swap_layers(monkeypatch: pytest.MonkeyPatch, pipeline: LensPipeline) -> None:
    features = pipeline.features
    monkeypatch.setattr(pipeline, "features", lambda *asked: features(*asked)[:, :, [1, 0, 2, 3]])


def crop_one_more(monkeypatch: pytest.MonkeyPatch, pipeline: LensPipeline) -> None:
    features = pipeline.features
    monkeypatch.setattr(pipeline, "features", lambda *asked: features(*asked)[:, 1:])


def encode_the_empty_negative(monkeypatch: pytest.MonkeyPatch, pipeline: LensPipeline) -> None:
    monkeypatch.setattr(pipeline, "empty_features", lambda: pipeline.features(""))


def transpose_the_grid(monkeypatch: pytest.MonkeyPatch, pipeline: LensPipeline) -> None:
    positions = run.joint_positions
    monkeypatch.setattr(run, "joint_positions", lambda h, w, *rest: positions(w, h, *rest))


@pytest.mark.parametrize(
    "mistake", [shift_mu, swap_layers, crop_one_more, encode_the_empty_negative, transpose_the_grid]
)
def test_a_mistake_moves_the_picture_far_beyond_the_tolerance(
    pipeline: LensPipeline, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable
):
    noise = pipeline.noise(3, 1, SIZE)
    want_picture, want_latents = oracle(tiny_folder, noise, cfg=5.0)
    mistake(monkeypatch, pipeline)
    picture, latents = draw(pipeline, noise, cfg=5.0)
    assert relative_l2(latents, want_latents) > 30 * LATENTS
    assert np.abs(picture.astype(int) - want_picture.astype(int)).max() > 3 * BYTES


@pytest.mark.parametrize(("cfg", "forwards"), [(1.0, 1), (5.0, 2)])
def test_denoiser_runs_per_step(pipeline: LensPipeline, cfg: float, forwards: int):
    calls = []
    pipeline.denoiser.register_forward_hook(lambda *_: calls.append(1))
    pipeline(PROMPT, noise=pipeline.noise(3, 1, SIZE), size=SIZE, steps=3, cfg=cfg, negative="a green image")
    assert len(calls) == 3 * forwards


def test_the_encoder_runs_once_for_a_prompt_without_a_negative_one(pipeline: LensPipeline):
    calls = []
    pipeline.text.model.register_forward_hook(lambda *_: calls.append(1))
    pipeline(PROMPT, noise=pipeline.noise(3, 1, SIZE), size=SIZE, steps=1, cfg=5.0)
    assert len(calls) == 1


def test_at_cfg_1_the_negative_prompt_is_not_encoded(pipeline: LensPipeline):
    calls = []
    pipeline.text.model.register_forward_hook(lambda *_: calls.append(1))
    noise = pipeline.noise(3, 1, SIZE)
    pipeline(PROMPT, noise=noise, size=SIZE, steps=1, cfg=1.0, negative="a green image")
    assert len(calls) == 1


def test_the_same_seed_draws_the_same_bytes(pipeline: LensPipeline):
    settings = {"size": SIZE, "steps": 2, "cfg": 5.0}
    first, second = (pipeline(PROMPT, noise=pipeline.noise(3, 1, SIZE), **settings) for _ in range(2))
    assert torch.equal(first, second)
    other = pipeline(PROMPT, noise=pipeline.noise(4, 1, SIZE), **settings)
    assert not torch.equal(first, other)


def test_on_step_reports_and_cancels(pipeline: LensPipeline):
    def stop(done: int, total: int) -> None:
        assert total == 4
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        pipeline(PROMPT, noise=pipeline.noise(3, 1, SIZE), size=SIZE, steps=4, cfg=1.0, on_step=stop)


def test_a_bf16_picture_resembles_the_fp32_one(tiny_folder: Path, pipeline: LensPipeline):
    rounded = LensPipeline.from_folder(tiny_folder, torch.device("cpu"), torch.bfloat16)
    noise = rounded.noise(3, 1, SIZE)
    assert noise.dtype == torch.bfloat16
    got = rounded(PROMPT, noise=noise, size=SIZE, steps=4, cfg=1.0)
    want = pipeline(PROMPT, noise=noise.float(), size=SIZE, steps=4, cfg=1.0)
    # 0.6 % of noise per velocity and 1.4 % in the VAE are about 1 byte in the mean.
    assert (got.int() - want.int()).abs().float().mean() < 3
