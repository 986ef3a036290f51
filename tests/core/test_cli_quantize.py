"""``python -m lens_core quantize``, and pictures with a denoiser that is quantised as it loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from tqdm import tqdm

from lens_core import cli, cli_quantize
from lens_core.images import read_settings
from lens_core.loading import open_denoiser
from lens_core.quant import policy
from lens_core.quant.policy import MODES
from lens_core.quantize_file import quantize_file
from tests.core.cli_pictures import SETTINGS, SMALL, Generate, pixels

SINGLE = "diffusion_models/lens_turbo_tiny_bf16.safetensors"
PICTURE = (*SMALL, "--height", 32, "--width", 32, "--prompt", "a red circle", "--seed", 7, "--steps", 2)


@pytest.fixture
def run(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """The command on the tiny models in this process: exit code, stdout, stderr."""

    def call(*flags: object, model: object = tiny_models / SINGLE, out: str = "q.safetensors") -> tuple:
        given = ("quantize", "--model", model, "--out", tmp_path / out, "--device", "cpu")
        code = cli.main([str(argument) for argument in (*given, "--quant_transformer", "nvfp4", *flags)])
        return code, *capsys.readouterr()

    return call


def test_a_file_is_written_and_named(run: Callable, tiny_models: Path, tmp_path: Path):
    code, out, _ = run("--quant_transformer", "int8_dynamic")
    assert (code, out) == (0, f"{tmp_path / 'q.safetensors'}\n")
    expected = quantize_file(
        open_denoiser(tiny_models / SINGLE), "int8_dynamic", tmp_path / "expected.safetensors"
    )
    assert (tmp_path / "q.safetensors").read_bytes() == expected.read_bytes()


def test_a_whole_folder_is_a_model_too(run: Callable, tiny_folder: Path, tmp_path: Path):
    assert run(model=tiny_folder)[0] == 0
    (layer, *_) = open_denoiser(tmp_path / "q.safetensors").stored.values()
    assert layer.packed.form.name == "nvfp4"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--quant_transformer", "int3"), ["one of float8_weight_only, ", "got int3"]),
        (("--quant_transformer", "auto"), ["one of float8_weight_only, ", "got auto"]),
        (("--device", "gpu0"), ["--device", "gpu0"]),
        (("--model", "nowhere.safetensors"), ["There is no file nowhere.safetensors"]),
        (
            ("--model", "{models}/vae/flux2_tiny_vae.safetensors"),
            ["a FLUX.2 VAE", "expected a Lens denoiser"],
        ),
        (("--out", "{models}/" + SINGLE, "--overwrite"), ["would replace the file", "Give another name"]),
        (("--out", "q.gguf"), ["q.gguf does not end in .safetensors"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_bad_setting_is_one_line_and_exit_code_2(
    run: Callable, tiny_models: Path, tmp_path: Path, flags: tuple[str, ...], said: list[str]
):
    code, out, err = run(*(flag.format(models=tiny_models) for flag in flags))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert [part for part in said if part not in err] == []
    assert list(tmp_path.iterdir()) == []


def test_only_overwrite_replaces_a_file(run: Callable, tmp_path: Path):
    (tmp_path / "q.safetensors").write_bytes(b"mine")
    code, _, err = run()
    assert code == 2 and "q.safetensors exists already" in err
    assert (tmp_path / "q.safetensors").read_bytes() == b"mine"
    assert run("--overwrite")[0] == 0
    assert run()[0] == 0, "it holds just this already"
    assert run("--quant_transformer", "mxfp8")[0] == 2


def test_ctrl_c_leaves_what_the_same_command_goes_on_with(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")

    def press(done: int, total: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli_quantize, "_show", lambda bar: press)
        code, _, err = run()
    assert (code, err.splitlines()[-1]) == (130, "cancelled")
    assert "the same command goes on there" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["q.safetensors.part"]
    assert run()[0] == 0
    assert "Going on with" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["q.safetensors"]


def test_the_bar_may_begin_in_the_middle():
    bar = tqdm(file=StringIO())
    for done in range(33, 95):
        cli_quantize._show(bar)(done, 94)
        assert (bar.n, bar.total) == (done, 94)


def test_help_lists_flags_and_modes(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        cli.main(["quantize", "--help"])
    shown = capsys.readouterr().out
    for part in ("--model", "--quant_transformer", "--out", "--device", "--overwrite", *MODES):
        assert part in shown


# Pictures


def test_a_picture_from_a_quantised_denoiser_says_so(generate: Generate):
    (plain,) = generate(*PICTURE, out="plain")
    (given,) = generate(*PICTURE, "--quant_transformer", "none", out="given")
    assert given.read_bytes() == plain.read_bytes()
    (small,) = generate(*PICTURE, "--quant_transformer", "int4_weight_only", out="small")
    assert pixels(small) != pixels(plain)
    assert read_settings(plain).keys() == SETTINGS
    assert read_settings(small).keys() == {*SETTINGS, "quant_transformer"}
    assert read_settings(small)["quant_transformer"] == "int4_weight_only"


def test_a_folder_with_the_written_file_draws_what_quantising_while_loading_does(
    generate: Generate, tiny_folder: Path, tmp_path: Path
):
    """In bfloat16, which is what the file keeps all else in."""
    flags = (*PICTURE, "--dtype", "bfloat16")
    (loading,) = generate(*flags, "--quant_transformer", "int8_weight_only", out="loading")
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "Lens-small"))
    shutil.rmtree(folder / "transformer")
    quantize_file(
        open_denoiser(tiny_folder),
        "int8_weight_only",
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    (written,) = generate(*flags, repo=folder, out="written")
    assert pixels(written) == pixels(loading)


def test_auto_is_recorded_as_what_it_chose(generate: Generate, monkeypatch: pytest.MonkeyPatch):
    (plain,) = generate(*PICTURE, out="plain")
    (whole,) = generate(*PICTURE, "--quant_transformer", "auto", out="whole")
    assert whole.read_bytes() == plain.read_bytes(), "on a CPU"
    monkeypatch.setattr(policy, "choose", lambda *_: ("int8_dynamic", "it is a test"))
    (small,) = generate(*PICTURE, "--quant_transformer", "auto", out="small")
    assert read_settings(small)["quant_transformer"] == "int8_dynamic"


def test_an_unknown_mode_is_refused_before_anything_is_loaded(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    flags = ("--repo_id", tiny_folder, "--out", tmp_path / "out", *PICTURE, "--quant_transformer", "int3")
    assert cli.main(["generate", *map(str, flags)]) == 2
    assert "--quant_transformer must be one of none, auto, float8_weight_only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
