"""``python -m lens_core check``: the report as text and JSON, its exit codes, what it keeps private."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lens_core import cli

Run = Callable[..., tuple[int, str, str]]
SECTIONS = ["Environment", "Fast paths on CPU, float32", "Files", "Parity"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    """The command in this process: exit code, stdout, stderr."""

    def call(*flags: object) -> tuple[int, str, str]:
        code = cli.main(["check", "--device", "cpu", *(str(flag) for flag in flags)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def home(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home with a Lens folder in it."""
    home = tmp_path / "Joe Doe"
    shutil.copytree(tiny_models / "lens" / "Lens-tiny", home / "my models" / "Lens-tiny")
    monkeypatch.setenv("HOME", str(home))
    return home


def test_the_whole_report(run: Run, home: Path, tmp_path: Path):
    code, out, _ = run(home / "my models", "--hash", "--values", "--parity")
    assert code == 0
    assert [line for line in out.splitlines() if line in SECTIONS] == SECTIONS
    assert out.count("ok: ") == 3 and out.count("SHA-256 ") == 6 and out.count("in float32, computed") == 2
    assert "not compared: its reference is ComfyUI's own Lens" in out
    assert out.endswith("Result: nothing is broken.\n")
    assert len(out.splitlines()) < 100
    assert [private for private in ("Joe", "my models", str(tmp_path)) if private in out] == []


def test_folders_are_shown_if_asked_and_home_is_not(run: Run, home: Path):
    _, out, _ = run(home / "my models", "--paths")
    assert "~/my models/Lens-tiny/vae" in out and "Joe" not in out


def test_a_broken_file_is_exit_code_1(run: Run, home: Path):
    shard = next(home.rglob("transformer/*-00001-of-*"))
    os.truncate(shard, shard.stat().st_size // 2)
    code, out, _ = run(home)
    assert code == 1
    assert "! Lens-tiny/transformer " in out and "is cut short" in out
    assert "Result: 1 thing is BROKEN" in out and "Joe" not in out


def test_json_holds_the_same(run: Run, home: Path):
    shutil.rmtree(home / "my models" / "Lens-tiny" / "text_encoder")
    (home / "bad.safetensors").write_bytes(b"x")
    code, out, _ = run(home, "--json")
    report = json.loads(out)
    assert (code, report["broken"]) == (1, 1)
    assert [section["title"] for section in report["sections"]] == SECTIONS[:3]
    denoiser = next(x for x in report["sections"][2]["findings"] if x["name"] == "Lens-tiny/transformer")
    assert denoiser["component"] == "denoiser" and denoiser["quantisation"] == "F32"
    assert denoiser["size"] > 1_000_000 and denoiser["broken"] is False
    assert "Joe" not in out


def test_without_files_it_is_about_the_computer(run: Run):
    code, out, _ = run()
    assert code == 0
    assert [line for line in out.splitlines() if line in SECTIONS] == SECTIONS[:2]


def test_an_empty_folder_says_so(run: Run, tmp_path: Path):
    assert "nothing here that a loader of Lens would take" in run(tmp_path)[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--dtype", "float16"), "--dtype must be one of auto, bfloat16, float32"),
        (("--parity",), "name some"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_code_2(run: Run, flags: tuple[str, ...], said: str):
    code, out, err = run(*flags)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
