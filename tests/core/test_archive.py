"""What the registry gets: its own client packs the files and runs its checks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
LEFT_OUT = {".ci", ".comfyignore", ".gitignore", "CONTRIBUTING.md", "benchmarks", "scripts", "tests", "tools"}


def tracked() -> set[str]:
    """The repository's files, those not committed yet too."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PACK,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.split("\0") if name and (PACK / name).is_file()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files in a folder of their own, which the client may write into."""
    folder = tmp_path_factory.mktemp("copy")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACK / name, folder / name)
    for arguments in (["init", "-q"], ["add", "--all"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def comfy(folder: Path, *arguments: str) -> str:
    """What comfy-cli prints. It says nothing to anyone, and its settings go beside the copy."""
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", *arguments]
    environment = {**os.environ, "HOME": str(folder.parent), "DO_NOT_TRACK": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def test_the_registrys_checks_pass(copy: Path):
    assert "All validation checks passed" in comfy(copy, "node", "validate")


def test_the_archive_has_the_pack_and_nothing_of_its_making(copy: Path):
    comfy(copy, "node", "pack")
    with zipfile.ZipFile(copy / "node.zip") as archive:
        packed = set(archive.namelist())
    assert packed == {name for name in tracked() if name.split("/")[0] not in LEFT_OUT}
    for folder in ("web/docs", "web/js", "example_workflows", "subgraphs", "lens_core", "nodes"):
        assert any(name.startswith(f"{folder}/") for name in packed), folder
