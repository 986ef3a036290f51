"""What tests share: the tiny denoiser and its oracle; the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lens_core import cli
from lens_core.denoiser import LensDenoiser
from lens_core.loading import load_denoiser
from tests.core.cli_pictures import Generate
from tests.reference import straight_line


@pytest.fixture
def denoiser(tiny_folder: Path) -> LensDenoiser:
    """The tiny denoiser in fp32, each test's own."""
    return load_denoiser(tiny_folder, torch.float32)


@pytest.fixture(scope="module")
def oracle(tiny_folder: Path) -> straight_line.Model:
    """The straight-line rendering's tensors of the tiny folder."""
    return straight_line.load_folder(tiny_folder)


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, so that no test writes into the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def generate(tiny_folder: Path, tmp_path: Path, cache_home: Path) -> Generate:
    """Runs the command and returns the pictures below ``out``, in the order of their names."""

    def run(*flags: object, repo: Path = tiny_folder, out: str = "out") -> list[Path]:
        arguments = ["generate", "--repo_id", repo, "--out", tmp_path / out, *flags]
        assert cli.main([str(argument) for argument in arguments]) == 0
        return sorted((tmp_path / out).iterdir())

    return run
