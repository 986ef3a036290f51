"""The flags for GPU memory: what they mean, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lens_core import cli
from lens_core.pipeline import LensPipeline

PICTURE = ("--prompt", "a red circle", "--height", 32, "--width", 32, "--steps", 1, "--seed", 3)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pipeline was made with."""
    made: dict[str, Any] = {}
    original = LensPipeline.from_folder.__func__

    def spy(cls, folder, device, dtype, on_tensor, options, quantization, offload, budget, loras, **parts):
        made.update(offload=offload, budget=budget)
        settings = (device, dtype, on_tensor, options, quantization, offload, budget, loras)
        return original(cls, folder, *settings, **parts)

    monkeypatch.setattr(LensPipeline, "from_folder", classmethod(spy))
    return made


@pytest.mark.parametrize(
    ("flags", "meant"),
    [
        ((), "auto"),
        (("--offload",), "model"),
        (("--offload", "stream"), "stream"),
        (("--offload", "none"), "none"),
    ],
)
def test_offload(generate, given: dict[str, Any], flags: tuple[str, ...], meant: str):
    assert len(generate(*PICTURE, *flags)) == 1
    assert given == {"offload": meant, "budget": None}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--offload", "disk"), "--offload must be one of auto, none, model, stream, got disk"),
        (("--vram_budget", "0"), "--vram_budget must be above 0 GB, got 0.0"),
        (("--vram_budget", "nan"), "--vram_budget must be above 0 GB"),
        (("--vram_budget", "8"), "--vram_budget limits an NVIDIA GPU, but --device is cpu. Leave it out"),
    ],
)
def test_refused(tiny_folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], told: str):
    arguments = ("generate", "--repo_id", tiny_folder, *PICTURE, *flags)
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("device", "number"), [("cuda", 3), ("cuda:1", 1)])
@pytest.mark.parametrize(("budget", "share"), [(8.0, 0.4), (40.0, 1.0), (None, None)])
def test_a_budget_is_enforced(
    monkeypatch, device: str, number: int, budget: float | None, share: float | None
):
    """On the GPU that is used, by its number: PyTorch takes no device without one here."""
    limits: dict[int, float] = {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=20e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, n: limits.update({n: f}))
    bytes_ = cli._limited(torch.device(device), budget)
    assert bytes_ == (None if budget is None else budget * 1e9)
    assert limits == ({} if share is None else {number: share})


def test_the_help_says_what_each_does(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--offload [MODE]",
        "layers come one by one",
        "--vram_budget GB",
        "no more of the GPU than this",
    ):
        assert part in text
