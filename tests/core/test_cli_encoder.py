"""The text encoder's flags of ``python -m lens_core generate``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lens_core import cli
from lens_core.config import EncoderOptions
from lens_core.images import read_settings
from lens_core.pipeline import LensPipeline
from tests.core.cli_pictures import SETTINGS, SMALL, Generate, pixels

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[EncoderOptions]:
    """The encoder's options of every pipeline that is loaded."""
    seen: list[EncoderOptions] = []
    real = LensPipeline.from_folder

    def spy(*arguments: Any, **named: Any) -> LensPipeline:
        pipeline = real(*arguments, **named)
        seen.append(pipeline.options)
        return pipeline

    monkeypatch.setattr(LensPipeline, "from_folder", spy)
    return seen


ONE_STEP = (*SMALL, "--height", 32, "--width", 32, "--steps", 1, "--seed", 7)
LONG_PROMPT = "a red circle" + " of the image" * 40


def test_without_flags_the_encoder_has_its_defaults_and_a_cache_at_home(
    generate: Generate, chosen: list[EncoderOptions], cache_home: Path
):
    (path,) = generate(*ONE_STEP, "--prompt", "a")
    assert chosen == [EncoderOptions(feature_cache=cache_home / "lens" / "features")]
    assert read_settings(path).keys() == SETTINGS


@pytest.mark.parametrize(
    ("flags", "options", "settings"),
    [
        (["--disable_mxfp4"], {"dense": True}, {"disable_mxfp4": True}),
        (["--encoder_placement", "cpu"], {"placement": "cpu"}, {"encoder_placement": "cpu"}),
        (["--extended_prompt"], {"extended": True}, {"extended_prompt": True}),
        (["--template_date", "2024-02-29"], {"date": "2024-02-29"}, {"template_date": "2024-02-29"}),
        (["--template_date", "today"], {"date": "2027-03-09"}, {"template_date": "2027-03-09"}),
        (["--template_date", "2026-05-23"], {}, {}),
        (["--feature_cache", "some where"], {"feature_cache": Path("some where")}, {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_reaches_the_encoder_and_the_picture_unless_it_changes_nothing(
    generate: Generate,
    chosen: list[EncoderOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    options: dict[str, Any],
    settings: dict[str, Any],
):
    monkeypatch.chdir(tmp_path)  # one of the folders is relative
    monkeypatch.setattr(cli, "today", lambda: "2027-03-09")
    (path,) = generate(*ONE_STEP, "--prompt", "a", "--feature_cache", "off", *flags)
    assert chosen == [EncoderOptions(**options)]
    written = read_settings(path)
    assert {name: written[name] for name in written.keys() - SETTINGS} == settings


def test_the_date_changes_the_picture(generate: Generate):
    flags = (*ONE_STEP, "--prompt", "a red circle")
    (pinned,) = generate(*flags, out="pinned")
    (other,) = generate(*flags, "--template_date", "2027-03-09", out="other")
    assert pixels(pinned) != pixels(other)


def test_a_long_prompt_is_cut_with_one_warning_unless_extended(
    generate: Generate, caplog: pytest.LogCaptureFixture
):
    (cut,) = generate(*ONE_STEP, "--prompt", LONG_PROMPT, out="cut")
    (warning,) = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert "at most 69 fit" in warning
    caplog.clear()
    (whole,) = generate(*ONE_STEP, "--prompt", LONG_PROMPT, "--extended_prompt", out="whole")
    assert not caplog.records
    assert pixels(cut) != pixels(whole)
    assert read_settings(whole)["prompt"] == read_settings(cut)["prompt"] == LONG_PROMPT


def test_the_warning_of_a_cut_is_a_line_of_its_own_on_the_terminal(tiny_folder: Path, tmp_path: Path):
    flags = ["generate", "--repo_id", tiny_folder, "--out", tmp_path, "--prompt", LONG_PROMPT, *ONE_STEP]
    command = [sys.executable, "-m", "lens_core", *map(str, flags)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert len([line for line in lines if line.startswith("The prompt has ")]) == 1
    assert done.stdout.strip() == str(tmp_path / "lens_00001.png")


@pytest.mark.parametrize(
    ("given", "home", "folder"),
    [
        ("/caches", "/home/me", "/caches/lens/features"),
        ("", "/home/me", "/home/me/.cache/lens/features"),
        ("relative", "/home/me", "/home/me/.cache/lens/features"),
        ("", "~", "off"),
        ("/caches", "~", "/caches/lens/features"),
    ],
)
def test_where_features_are_kept(monkeypatch: pytest.MonkeyPatch, given: str, home: str, folder: str):
    # expanduser leaves "~" as it is for a user without a home, as in some containers.
    monkeypatch.setattr("os.path.expanduser", lambda path: path.replace("~", home))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cli.default_cache() == folder
    assert cli.build_parser().parse_args(["cache"]).folder == folder
