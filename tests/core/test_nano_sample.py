"""Drawing many nano scenes at once, and the benchmark that counts what is right in them."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import nano
from lens_core.pipeline import LensPipeline
from lens_core.sampling import reference_noise, sigmas
from lens_core.sampling.schedule import empirical_mu
from tools.nano.captions import plain_caption
from tools.nano.checker import decided, judge
from tools.nano.sample import Parts, draw
from tools.nano.scenes import Scene, sample_scene

# Sizes apart in every way; the first twice, with prompts of other lengths.
SIZES = ((208, 320), (176, 352), (208, 320))


def test_many_at_once_are_the_pipelines_pictures(nano_models: Path):
    """In fp32: the same prompts, noise, schedule and guidance; only padding and batching differ."""
    rng, cpu = random.Random(0), torch.device("cpu")
    scenes = [sample_scene(rng, size=size) for size in SIZES]
    assert len({len(plain_caption(scene)) for scene in scenes}) == len(scenes)
    parts = Parts.load(nano_models / "lens", cpu, dtype=torch.float32)
    pictures = draw(parts, scenes, 2, 5.0, seed=7)
    pipeline = LensPipeline.from_folder(nano_models / "lens", cpu, torch.float32)
    for index, (scene, size, picture) in enumerate(zip(scenes, SIZES, pictures, strict=True)):
        noise = reference_noise(7 + index, 1, size[0] * size[1] // 256, 32, torch.float32, "cpu")
        want = pipeline(plain_caption(scene), noise=noise, size=size, steps=2, cfg=5.0)[0]
        assert picture.shape == want.shape == (*size, 3)
        assert want.float().std() > 10, "a flat picture"
        # Bytes are cut off, so a value on the edge may fall on either side.
        assert (picture.int() - want.int()).abs().max() <= 1


def test_the_benchmark_compares_modes_and_mistakes(nano_models: Path):
    args = Namespace(
        device="cpu",
        checkpoints=nano_models,
        prompts=2,
        variants=["lens-turbo"],
        modes=["int8_weight_only"],
        batch=2,
        only="",
        no_ablations=False,
    )
    rows = nano.measure(args, lambda scenes, pictures, told: list(map(judge, scenes, pictures)))
    found = [(row["mode"], row["cfg"], row["mistake"]) for row in rows]
    assert found == [
        *((mode, cfg, "") for mode in ("none", "int8_weight_only") for cfg in (2.0, 1.0)),
        ("none", 1.0, "schedule: mu 1.15"),
        ("none", 1.0, "layers reversed"),
    ]
    assert all(0 <= value <= 1 for row in rows for value in row["right"].values())
    assert [len(nano.line(row)) for row in rows] == [4 + len(nano.KEYS)] * len(rows)


def test_without_a_prompt_the_pictures_themselves_are_judged(nano_models: Path):
    """Lens alone, in its steps and in Turbo's; no word reaches the denoiser."""
    asked = []
    args = Namespace(
        device="cpu",
        checkpoints=nano_models,
        prompts=1,
        variants=["lens"],
        modes=[],
        batch=1,
        only=nano.NO_PROMPT,
        no_ablations=False,
    )

    def judged(scenes: Sequence[Scene], pictures: Sequence[np.ndarray], told: bool) -> list[dict[str, bool]]:
        asked.append(told)
        return list(map(decided, pictures))

    rows = nano.measure(args, judged)
    assert asked == [False] * 4 and [row["steps"] for row in rows] == [20, 20, 4, 4]
    assert [("mu 1.15" in row["mistake"], row["cfg"]) for row in rows] == [(False, 1.0), (True, 1.0)] * 2
    assert all(set(row["right"]) == {"background", "shape"} for row in rows)
    features = [torch.ones(3, 4, 64)]
    assert all(
        each.changes["features"][0].shape == (0, 4, 64) for each in nano.without_prompts("lens", features, 4)
    )


def test_the_wrong_schedule_is_the_right_one_but_for_its_shift():
    right, wrong = sigmas(20, 256), nano.constant_shift(20, 256)
    assert torch.equal(nano.constant_shift(20, 256, empirical_mu(256, 20)), right)
    assert 0.1 < (right - wrong).abs().max() < 0.3


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_wrong_guidance_is_the_right_one_where_there_is_none(scale: float):
    x, wanted, unwanted = torch.randn(3, 2, 9, 32)
    guided = nano.guidance_on_data(x, torch.tensor(0.7), wanted, unwanted, scale)
    apart = float((guided - wanted).abs().max())
    assert apart < 1e-5 if scale == 1 else apart > 0.1


def test_layers_are_reversed():
    features = torch.randn(5, 4, 3)
    (turned,) = nano.reversed_layers([features])
    assert np.array_equal(turned[:, 0], features[:, 3]) and np.array_equal(turned[:, 1], features[:, 2])
