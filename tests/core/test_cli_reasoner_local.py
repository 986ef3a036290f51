"""``generate --reasoner local``: prompts written by the encoder of the folder that draws them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from lens_core import cli, cli_reasoner
from lens_core.images import read_settings
from lens_core.pipeline import LensPipeline
from lens_core.reasoner import PRESETS
from lens_core.reasoner.local import LocalOptions
from lens_core.reasoner.sampling import Sampling
from tests.core.cli_pictures import SETTINGS, SMALL, Generate, pixels

LOCAL = ("--reasoner", "local", "--reasoner_preset", "short", "--reasoner_effort", "none")
ONE_STEP = (*SMALL, "--height", 32, "--width", 32, "--steps", 1, "--seed", 7)


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer has a token for every letter of the presets' texts, and random answers never end."""
    monkeypatch.setitem(PRESETS, "short", "Rewrite.")
    monkeypatch.setattr(cli_reasoner, "LocalOptions", partial(LocalOptions, max_new_tokens=8))


def test_the_written_prompt_is_drawn(generate: Generate):
    first, second = generate(*ONE_STEP, *LOCAL, "--prompt", "a cat | a dog")
    settings = [read_settings(path) for path in (first, second)]
    added = {"original_prompt", "reasoner", "reasoner_preset", "reasoner_effort"}
    assert settings[0].keys() == SETTINGS | added
    assert [one["original_prompt"] for one in settings] == ["a cat", "a dog"]
    assert settings[0]["prompt"] not in ("", "a cat", settings[1]["prompt"])
    again = generate(*ONE_STEP, *LOCAL, "--prompt", "a cat | a dog", out="again")
    assert [pixels(path) for path in again] == [pixels(first), pixels(second)]


def test_a_wrong_effort(tiny_folder: Path, capsys: pytest.CaptureFixture):
    folder = ["--repo_id", str(tiny_folder), "--prompt", "a", "--device", "cpu"]
    assert cli.main(["generate", *folder, *LOCAL, "--reasoner_effort", "most"]) == 2
    assert "--reasoner_effort must be one of none, low" in capsys.readouterr().err


def test_on_a_gpu_the_encoder_leaves_when_it_has_written(tiny_folder: Path):
    """cpu:0 stands for a GPU. What a plan for a picture does not count is gone before one is made."""
    options = LocalOptions(Sampling(temperature=0), 8, "none")
    device = torch.device("cpu:0")
    pipeline = LensPipeline.from_folder(tiny_folder, device, torch.float32)
    resident: list[int] = []
    got = pipeline.rewrite(
        "a cat", "short", options, lambda *_: resident.append(len(pipeline.text.layers._resident))
    )
    assert set(resident) == {24} and pipeline.text.layers.loaded == pipeline.text.beside == 0
    cpu = LensPipeline.from_folder(tiny_folder, torch.device("cpu"), torch.float32)
    assert got == cpu.rewrite("a cat", "short", options)


@pytest.mark.parametrize("room, layers", [(0, 0), (7.5, 5), (24, 24)])
def test_a_budget_is_shared_with_the_head(tiny_folder: Path, room: float, layers: int):
    pipeline = LensPipeline.from_folder(tiny_folder, torch.device("cpu:0"), torch.float32)
    [size] = set(pipeline.text.layers.sizes)
    pipeline.residence.budget = 1e6 + room * size
    assert pipeline.residence.for_writing(1_000_000) == torch.device("cpu:0")
    assert pipeline.text.layers.loaded == layers * size
