"""``python -m lens_core generate`` in this process: its pictures, their settings, and one-line errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lens_core import __version__, cli
from lens_core.denoiser import LensDenoiser, nag
from lens_core.images import read_settings
from tests.core.cli_pictures import SETTINGS, SMALL, Generate, pixels

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture
def error(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs the command, which must fail with exit code 2 and one line on stderr; returns the line."""

    def run(*flags: object, repo: object = tiny_folder, out: Path = tmp_path / "out") -> str:
        fixed = ("--prompt", "a fox", "--device", "cpu", "--repo_id", repo, "--out", out)
        arguments = ["generate", *fixed, *flags]
        assert cli.main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("error: ")
        return captured.err

    return run


def test_a_picture_of_a_bucket_appears_with_all_its_settings(
    generate: Generate, capsys: pytest.CaptureFixture
):
    (path,) = generate(
        *("--prompt", "a red circle", "--negative_prompt", "a blue square", "--base_resolution", 512),
        *("--aspect_ratio", "1:2", "--steps", 2, "--cfg", 3.5, "--seed", 7, "--device", "cpu"),
    )
    assert path.name == "lens_00001.png"
    assert capsys.readouterr().out.strip() == str(path)
    with Image.open(path) as image:
        assert image.size == (352, 704)
        assert image.mode == "RGB"
    settings = read_settings(path)
    assert settings.keys() == SETTINGS
    assert settings == {
        "prompt": "a red circle",
        "negative_prompt": "a blue square",
        "height": 704,
        "width": 352,
        "steps": 2,
        "cfg": 3.5,
        "seed": 7,
        "n": 1,
        "index": 0,
        "batch": 1,
        "dtype": "bfloat16",
        "device": "cpu",
        "checkpoint": "Lens-tiny",
        "variant": "Lens",
        "version": __version__,
    }


def test_height_and_width_make_other_sizes(generate: Generate):
    (path,) = generate(*SMALL, "--prompt", "a", "--steps", 1, "--seed", 1)
    with Image.open(path) as image:
        assert image.size == (48, 64)
    assert read_settings(path)["height"] == 64
    assert read_settings(path)["width"] == 48


def test_the_same_seed_reproduces_the_file(generate: Generate):
    flags = (*SMALL, "--prompt", "a red circle", "--steps", 2, "--seed", 7)
    (first,) = generate(*flags, out="first")
    (second,) = generate(*flags, out="second")
    assert first.read_bytes() == second.read_bytes()
    (other,) = generate(*flags[:-1], 8, out="other")
    assert pixels(other) != pixels(first)


def test_without_a_seed_the_chosen_one_is_written_and_reproduces(generate: Generate):
    flags = (*SMALL, "--prompt", "a red circle", "--steps", 1)
    (first,) = generate(*flags, out="first")
    (second,) = generate(*flags, out="second")
    seed = read_settings(first)["seed"]
    assert isinstance(seed, int)
    assert seed != read_settings(second)["seed"]
    (again,) = generate(*flags, "--seed", seed, out="again")
    assert again.read_bytes() == first.read_bytes()


def test_two_prompts_twice_are_four_different_pictures(generate: Generate):
    paths = generate(*SMALL, "--prompt", "a red circle | a blue square", "--n", 2, "--steps", 1, "--seed", 7)
    assert [path.name for path in paths] == [f"lens_0000{number}.png" for number in (1, 2, 3, 4)]
    settings = [read_settings(path) for path in paths]
    assert [one["prompt"] for one in settings] == ["a red circle"] * 2 + ["a blue square"] * 2
    assert [one["index"] for one in settings] == [0, 1, 2, 3]
    assert {(one["n"], one["batch"], one["seed"]) for one in settings} == {(2, 4, 7)}
    assert len({pixels(path) for path in paths}) == 4


def test_every_picture_of_a_run_has_its_own_noise(generate: Generate):
    paths = generate(*SMALL, "--prompt", "a fox|a fox", "--n", 2, "--steps", 1, "--seed", 7)
    assert len({pixels(path) for path in paths}) == 4


def test_any_text_survives_in_the_settings(generate: Generate):
    prompt = 'ein grüner Fuchs, 狐 🦊, "in quotes"\nand a second line'
    (path,) = generate(*SMALL, "--prompt", prompt, "--negative_prompt", "é", "--steps", 1)
    assert read_settings(path)["prompt"] == prompt
    assert read_settings(path)["negative_prompt"] == "é"


def test_a_prompts_text_changes_the_picture(generate: Generate):
    flags = (*SMALL, "--steps", 1, "--seed", 7)
    (one,) = generate(*flags, "--prompt", "a red circle", out="one")
    (other,) = generate(*flags, "--prompt", "a blue square", out="other")
    assert pixels(one) != pixels(other)


def test_pictures_are_numbered_after_those_in_the_folder(generate: Generate, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lens_00041.png").touch()
    paths = generate(*SMALL, "--prompt", "a", "--steps", 1)
    assert [path.name for path in paths] == ["lens_00041.png", "lens_00042.png"]


def test_an_empty_prompt_is_drawn_with_a_warning(generate: Generate, caplog: pytest.LogCaptureFixture):
    generate(*SMALL, "--prompt", "", "--steps", 1)
    assert "Prompt 1 is empty" in caplog.text


@pytest.mark.parametrize(
    ("name", "steps", "cfg", "variant"),
    [
        ("Lens-tiny", 20, 5.0, "Lens"),
        ("Lens-Turbo-tiny", 4, 1.0, "Lens-Turbo"),
        ("Lens-Base-tiny", 50, 5.0, "Lens-Base"),
    ],
)
def test_steps_and_cfg_follow_the_folders_name(
    generate: Generate, tiny_folder: Path, tmp_path: Path, name: str, steps: int, cfg: float, variant: str
):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / name))
    (path,) = generate(*SMALL, "--prompt", "a", "--height", 32, "--width", 32, repo=folder)
    settings = read_settings(path)
    assert (settings["steps"], settings["cfg"], settings["variant"]) == (steps, cfg, variant)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--dtype", "float16"), ["--dtype", "bfloat16", "float32", "float16", "1.4e5"]),
        (("--dtype", "int3"), ["--dtype", "bfloat16", "float32", "int3"]),
        (("--steps", 0), ["--steps", "at least 1", "0"]),
        (("--n", 0), ["--n", "at least 1", "0"]),
        (("--base_resolution", 999), ["base_resolution", "512, 768, 1024, 1440", "999"]),
        (("--aspect_ratio", "5:4"), ["aspect_ratio", "1:2, 9:16", "5:4"]),
        (("--height", 1000, "--width", 1000), ["1000x1000", "multiples of 16", "Try 992x992"]),
        (("--height", 512), ["--height and --width", "both"]),
        (("--width", 512), ["--height and --width", "both"]),
        (("--height", 512, "--width", 2048), ["2048x512", "1:2 to 2:1", "Try "]),
        (("--cfg", "nan"), ["--cfg", "nan"]),
        (("--cfg", "inf"), ["--cfg", "inf"]),
        (("--device", "gpu0"), ["--device", "gpu0"]),
        (("--device", "meta"), ["--device", "meta"]),
        (("--seed", 10**30), ["--seed", str(10**30)]),
        (("--step_cache", "-0.1"), ["--step_cache", "0 (off)", "-0.1"]),
        (("--step_cache", "nan"), ["--step_cache", "nan"]),
        (("--nag_scale", "-1"), ["--nag_scale", "0 (off)", "-1"]),
        (("--guidance_interval", 0.8, 0.2), ["--guidance_interval", "0 <= start <= end <= 1", "0.8", "0.2"]),
        (("--guidance_interval", 0, 2), ["--guidance_interval", "end 2"]),
        (("--encoder_placement", "ram"), ["--encoder_placement", "auto, gpu, stream, cpu", "ram"]),
        (("--encoder_placement", "gpu"), ["--encoder_placement gpu", "--device is cpu", "Use auto"]),
        (("--encoder_placement", "stream"), ["--encoder_placement stream", "--device is cpu"]),
        (("--template_date", "tomorrow"), ["--template_date", "pinned, today", "YYYY-MM-DD", "tomorrow"]),
        (("--template_date", "2026-02-30"), ["--template_date", "2026-02-30", "2026-05-23"]),
        (("--feature_cache", ""), ["--feature_cache", "folder"]),
        (("--feature_cache", __file__), ["--feature_cache", "test_cli.py", "folder"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_bad_setting_is_one_line_and_exit_code_2(
    error: Callable[..., str], tmp_path: Path, flags: tuple[Any, ...], said: list[str]
):
    # The first two so that a setting that is not refused costs little; a later flag outweighs them.
    line = error("--steps", 1, "--base_resolution", 512, *flags)
    assert [part for part in said if part not in line] == []
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_named_and_nothing_downloaded(error: Callable[..., str]):
    line = error("--steps", 1, repo="microsoft/Lens")
    for part in ("--repo_id microsoft/Lens", "no folder", "nothing is downloaded", "transformer/"):
        assert part in line


def test_a_folder_without_a_model_says_what_was_expected(error: Callable[..., str], tmp_path: Path):
    (tmp_path / "empty").mkdir()
    line = error("--steps", 1, repo=tmp_path / "empty")
    assert "Expected one .safetensors file" in line
    assert str(tmp_path / "empty") in line


def test_an_output_folder_that_is_a_file_is_refused(error: Callable[..., str], tmp_path: Path):
    (tmp_path / "taken").touch()
    line = error("--height", 32, "--width", 32, "--steps", 1, out=tmp_path / "taken")
    assert str(tmp_path / "taken") in line


def test_ctrl_c_ends_with_its_own_exit_code(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "generate", interrupt)
    assert cli.main(["generate", "--repo_id", str(tiny_folder), "--prompt", "a"]) == 130
    assert capsys.readouterr().err == "cancelled\n"


def test_a_write_that_fails_leaves_no_picture(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fill_the_disk(image: Image.Image, path: Path, **_: Any) -> None:
        path.write_bytes(b"half a picture")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        generate(*SMALL, "--prompt", "a", "--steps", 1)
    assert list((tmp_path / "out").glob("*.png")) == []


def test_help_names_every_flag_in_a_process_of_its_own():
    command = [sys.executable, "-m", "lens_core", "generate", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for flag in (
        *("--repo_id", "--prompt", "--negative_prompt", "--base_resolution", "--aspect_ratio", "--height"),
        *("--width", "--steps", "--cfg", "--n", "--seed", "--dtype", "--device", "--out", "--disable_mxfp4"),
        *("--encoder_placement", "--feature_cache", "--extended_prompt", "--template_date"),
        *("--step_cache", "--guidance_interval", "--nag_scale"),
    ):
        assert flag in done.stdout


# Fewer evaluations

EVALUATIONS = (*SMALL, "--height", 32, "--width", 32, "--prompt", "a red circle", "--seed", 7)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Text tokens of every evaluation of the denoiser."""
    seen: list[int] = []
    real = LensDenoiser.forward

    def spy(self: LensDenoiser, x: Any, sigma: Any, text: Any, *rest: Any, **options: Any) -> Any:
        seen.append(text.shape[1])
        return real(self, x, sigma, text, *rest, **options)

    monkeypatch.setattr(LensDenoiser, "forward", spy)
    return seen


def test_outside_the_guidance_interval_the_negative_is_not_evaluated(generate: Generate, texts: list[int]):
    flags = (*EVALUATIONS, "--steps", 5, "--cfg", 5)
    (whole,) = generate(*flags, out="whole")
    positive, *_ = texts
    assert texts == 5 * [positive, 0]
    texts.clear()
    (part,) = generate(*flags, "--guidance_interval", 0.2, 0.6, out="part")
    assert texts == [positive, *2 * (positive, 0), positive, positive]
    assert pixels(part) != pixels(whole)
    assert read_settings(part)["guidance_interval"] == [0.2, 0.6]


def test_an_interval_of_nothing_is_cfg_1(generate: Generate):
    flags = (*EVALUATIONS, "--steps", 3)
    (nothing,) = generate(*flags, "--cfg", 5, "--guidance_interval", 0, 0, out="nothing")
    (one,) = generate(*flags, "--cfg", 1, out="one")
    assert pixels(nothing) == pixels(one)


def test_the_step_cache_skips_and_says_how_much(generate: Generate, caplog: pytest.LogCaptureFixture):
    """Positive and negative have one length here; they are entries of their own all the same."""
    caplog.set_level("INFO")
    flags = (*EVALUATIONS, "--negative_prompt", "a red circle", "--steps", 6, "--cfg", 5)
    (full,) = generate(*flags, out="full")
    assert "skipped" not in caplog.text
    (skipping,) = generate(*flags, "--step_cache", 1e9, out="skipping")
    # Of six steps the first and the last are computed, and one after three skipped in a row.
    assert "6 of 12 forwards skipped 2 of 3 blocks." in caplog.text
    assert pixels(skipping) != pixels(full)
    assert read_settings(skipping)["step_cache"] == 1e9


def test_a_negative_at_cfg_1_needs_nag_scale(
    generate: Generate, texts: list[int], caplog: pytest.LogCaptureFixture
):
    nag._say_once.cache_clear()
    flags = (*EVALUATIONS, "--steps", 2, "--cfg", 1)
    negative = ("--negative_prompt", "a photograph of two dogs")
    (plain,) = generate(*flags, out="plain")
    assert "no effect" not in caplog.text
    (without,) = generate(*flags, *negative, out="without")
    assert "The negative has no effect at cfg 1. Set nag_scale" in caplog.text
    (avoided,) = generate(*flags, *negative, "--nag_scale", 8, out="avoided")
    (empty,) = generate(*flags, "--nag_scale", 8, out="empty")
    (outside,) = generate(*flags, *negative, "--nag_scale", 8, "--guidance_interval", 0, 0, out="outside")
    assert len(texts) == 5 * 2, "one forward a step"
    drawn = [pixels(path) for path in (plain, avoided, empty)]
    assert len(set(drawn)) == 3
    assert pixels(without) == pixels(outside) == drawn[0]
    assert read_settings(avoided)["nag_scale"] == 8
    assert "nag_scale" not in read_settings(without)


def test_flags_at_their_defaults_change_no_byte(generate: Generate):
    flags = (*EVALUATIONS, "--steps", 3)
    (without,) = generate(*flags, out="without")
    (given,) = generate(*flags, "--step_cache", 0, "--guidance_interval", 0, 1, "--nag_scale", 0, out="given")
    assert given.read_bytes() == without.read_bytes()
    assert read_settings(given).keys() == SETTINGS
