"""Nano Lens' files: recognised, as small as promised, and drawn by the same code as the published model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lens_core import cli
from lens_core.config import LENS, LENS_TURBO
from lens_core.errors import CheckpointMismatch
from lens_core.images import read_settings
from lens_core.loading import load_denoiser, load_vae, open_denoiser, open_encoder
from lens_core.pipeline import LensPipeline
from lens_core.quant.policy import MODES
from lens_core.tiny import models
from lens_core.weights import inspect
from tests.compare import relative_l2
from tests.core.cli_pictures import pixels
from tests.reference import straight_line
from tools.nano import configs
from tools.nano.export import NANO, export

WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZE = (208, 320)
# Of one velocity; each mode's rounding of a weight and less (see tests/host/test_quantization.py).
APART = {"float8": 0.08, "int8": 0.05, "int4": 0.25, "uint4": 0.25, "mxfp8": 0.08, "nvfp4": 0.25}


def test_each_part_is_recognised(nano_models: Path):
    found = {kind.component: kind for kind in inspect(nano_models / "lens")}
    assert found.keys() == {"denoiser", "encoder", "vae"}
    assert found["denoiser"].variant == NANO
    assert found["encoder"].quantisation == "MXFP4 experts"
    assert {found["denoiser"].quantisation, found["vae"].quantisation} == {"BF16"}


def test_turbo_is_turbo_whatever_its_folder_is_called(nano_models: Path, tmp_path: Path):
    shutil.copytree(nano_models / "lens-turbo", tmp_path / "renamed")
    for folder in (nano_models / "lens-turbo", tmp_path / "renamed"):
        (kind,) = inspect(folder)
        assert kind.variant == LENS_TURBO


def test_sizes_are_read_off_the_files(nano_models: Path):
    encoder = open_encoder(nano_models / "lens")
    assert open_denoiser(nano_models / "lens-turbo").config == configs.DENOISER
    assert encoder.config == configs.encoder_config(encoder.config.vocab_size)
    assert encoder.tokenizer.tokenizer.get_vocab_size() == encoder.config.vocab_size


def test_the_vae_needs_no_configuration_beside_it(nano_models: Path, tmp_path: Path):
    """As a host's node saves it: one file."""
    shutil.copy(nano_models / "lens" / "vae" / WEIGHTS, tmp_path / "vae.safetensors")
    alone, whole = (
        load_vae(path, torch.float32) for path in (tmp_path / "vae.safetensors", nano_models / "lens")
    )
    latents = torch.randn(1, 32, 3, 2)
    assert torch.equal(alone.decode(latents), whole.decode(latents))


def test_both_variants_fit_into_12_mb(nano_models: Path):
    files = sum(path.stat().st_size for path in nano_models.rglob("*") if path.is_file())
    vocabulary = open_encoder(nano_models / "lens").config.vocab_size
    # The trained tokenizer's further tokens: a row each in the embedding and the head, both in bf16.
    more = 2 * 2 * configs.DENOISER.enc_hidden_dim * (configs.VOCABULARY - vocabulary)
    assert files + more < 12_000_000


def test_a_picture_equals_the_oracles(nano_models: Path):
    """Bytes are cut off, so a value on the edge may fall on either side."""
    pipeline = LensPipeline.from_folder(nano_models / "lens", torch.device("cpu"), torch.float32)
    noise = pipeline.noise(3, 1, SIZE)
    picture = pipeline("a red circle", noise=noise, size=SIZE, steps=4, cfg=5.0)[0].numpy()
    height, width = SIZE
    folder = nano_models / "lens"
    settings = {"height": height, "width": width, "steps": 4, "cfg": 5.0}
    want = straight_line.render(folder, "a red circle", noise=noise[0], **settings)
    assert picture.shape == want.shape == (*SIZE, 3)
    assert picture.std() > 10, "a flat picture"
    assert np.abs(picture.astype(int) - want.astype(int)).max() <= 1


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_quantises_it(nano_models: Path, mode: str):
    text, grid = 100 * torch.randn(1, 5, 4, 64), (3, 4)
    x, level = torch.randn(1, 12, 32), torch.tensor([0.5])
    plain, quantised = (
        load_denoiser(nano_models / "lens", torch.float32, quantization=each)(x, level, text, grid)
        for each in ("none", mode)
    )
    assert 1e-4 < relative_l2(quantised, plain) < APART[mode.split("_")[0]]


@pytest.fixture
def generate(nano_models: Path, tmp_path: Path, cache_home: Path):
    """Runs the command with nano Turbo and one size; returns its exit code and the pictures."""

    def run(*flags: object, out: str = "out") -> tuple[int, list[Path]]:
        fixed = ("--repo_id", nano_models / "lens-turbo", "--prompt", "a red circle", "--seed", 3)
        place = (
            "--base_resolution",
            256,
            "--aspect_ratio",
            "1:2",
            "--device",
            "cpu",
            "--out",
            tmp_path / out,
        )
        code = cli.main([str(argument) for argument in ("generate", *fixed, *place, *flags)])
        return code, sorted(tmp_path.glob(f"{out}/*.png"))

    return run


def test_turbo_takes_encoder_and_vae_from_lens(generate, nano_models: Path):
    lens = nano_models / "lens"
    code, (path,) = generate("--text_encoder", lens, "--vae", lens)
    assert code == 0
    settings = read_settings(path)
    assert {name: settings[name] for name in ("variant", "steps", "cfg", "text_encoder", "vae")} == {
        "variant": "Lens-Turbo",
        "steps": 4,
        "cfg": 1.0,
        "text_encoder": "lens",
        "vae": "lens",
    }
    with Image.open(path) as image:
        assert image.size == (176, 352)
        assert np.asarray(image).std() > 10, "a flat picture"


def test_a_lora_shows(generate, nano_models: Path, tmp_path: Path):
    lora = tmp_path / "nano.safetensors"
    save_file(models.lora_weights(torch.Generator().manual_seed(0), configs.DENOISER), lora)
    parts = ("--text_encoder", nano_models / "lens", "--vae", nano_models / "lens")
    _, plain = generate(*parts, out="plain")
    _, changed = generate(*parts, "--lora", f"{lora}:0.5", out="changed")
    assert pixels(plain[0]) != pixels(changed[0])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "lens-turbo has no text_encoder/. Take it from another folder or a file with --text_encoder"),
        (("--text_encoder", "{lens}"), "lens-turbo has no vae/."),
        (("--text_encoder", "{lens}/nothing", "--vae", "{lens}"), "nothing"),
    ],
)
def test_what_the_folder_lacks_is_asked_for(generate, nano_models: Path, capsys, flags, told: str):
    code, pictures = generate(*(flag.format(lens=nano_models / "lens") for flag in flags))
    said = capsys.readouterr().err
    assert (code, pictures) == (2, [])
    assert said.startswith("error: ") and told in said


def test_an_export_that_no_loader_would_take_is_refused(nano_models: Path, tmp_path: Path):
    weights = load_file(nano_models / "lens" / "transformer" / WEIGHTS)
    del weights["proj_out.bias"]
    with pytest.raises(CheckpointMismatch, match=r"proj_out\.bias"):
        export(tmp_path, weights, None, None, None, LENS)
