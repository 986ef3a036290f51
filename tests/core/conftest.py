"""What tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from lens_core import cli
from tests.core.cli_pictures import Generate


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
