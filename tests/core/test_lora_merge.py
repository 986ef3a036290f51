"""LoRAs merged into weights that are quantised, in files and on the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lens_core import cli
from lens_core.denoiser import LensDenoiser
from lens_core.denoiser_file import DenoiserFile
from lens_core.errors import SettingError
from lens_core.images import read_settings
from lens_core.loading import build_denoiser, open_denoiser
from lens_core.lora.merge import Choice, Merge, open_loras, parse_choice
from lens_core.quant import policy
from lens_core.quant.linear import Packed
from lens_core.quant.policy import MODES, NONE
from lens_core.quantize_file import quantize_file
from tests import lora_files
from tests.compare import relative_l2
from tests.core.cli_pictures import Generate, pixels
from tests.core.denoiser_layouts import LAYOUTS, layers_of

QKV = "transformer_blocks.1.attn.txt_qkv"
# A quantised layer, one that no mode quantises, and one that needs padding in some modes.
LAYERS = (QKV, "transformer_blocks.0.img_mod.1", "transformer_blocks.2.img_mlp.w2")
PICTURE = ("--prompt", "a red circle", "--height", 32, "--width", 32, "--steps", 1, "--seed", 3,
           "--device", "cpu", "--dtype", "float32", "--feature_cache", "off")  # fmt: skip


@pytest.fixture(scope="module")
def file(tiny_folder: Path) -> DenoiserFile:
    return open_denoiser(tiny_folder)


@pytest.fixture
def merge(file: DenoiserFile, tmp_path: Path) -> Merge:
    lora_files.write(tmp_path / "x.safetensors", file.sizes, which=LAYERS)
    return open_loras([Choice(tmp_path / "x.safetensors", 0.5)], file.sizes)


def weight(model: LensDenoiser, layer: str) -> Tensor:
    return layers_of(model)[layer].dequantized(torch.float32)


def bits(packed: Packed) -> list[bytes]:
    tensors = [tensor for tensor in packed[1:] if tensor is not None]
    return [bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) for tensor in tensors]


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_quantises_the_merged_weight(file: DenoiserFile, merge: Merge, mode: str):
    """To the bit: the merged weight in fp32 and not one that was rounded in between."""
    state = build_denoiser(file, torch.float32, loras=merge).state_dict()
    model = build_denoiser(file, torch.bfloat16, mode=mode, loras=merge)
    want = policy.pack(state[f"{QKV}.weight"], MODES[mode])
    assert bits(layers_of(model)[QKV].packed()) == bits(want)
    plain = build_denoiser(file, torch.bfloat16, mode=mode)
    changed = {name for name in layers_of(plain) if not torch.equal(weight(model, name), weight(plain, name))}
    assert changed == set(LAYERS) & set(layers_of(plain)) and QKV in changed
    assert torch.equal(model.state_dict()[f"{LAYERS[1]}.weight"], state[f"{LAYERS[1]}.weight"].bfloat16())


# How far a weight in 4 or 8 bits is from what it stands for: measured 0.077 to 0.117, and 0.0047 to 0.054
# (float8_e5m2 has two bits after the point); without the LoRA it is 0.7.
_COARSE, _FINE = 0.13, 0.06
FOUR_BITS = ("convrot_w4a4", "nvfp4", "sdnq", "sdnq in fp32", "sdnq by 32, not flat", "Q4_0", "Q4_1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantised_file_stays_as_it_is_quantised(merge: Merge, tmp_path: Path, layout: str):
    path, _ = LAYOUTS[layout](tmp_path / "model" if layout.startswith("sdnq") else tmp_path)
    stored = open_denoiser(path)
    plain = build_denoiser(stored, torch.bfloat16)
    model = build_denoiser(stored, torch.bfloat16, loras=merge)
    kept = layers_of(model)
    assert {name: layer.form for name, layer in kept.items()} == {
        name: layer.form for name, layer in layers_of(plain).items()
    }
    compared = [name for name in LAYERS if name in kept]
    assert compared, "a comparison of nothing"
    for name in compared:
        before = weight(plain, name)
        want = merge.weight(name, before)
        limit = _COARSE if layout in FOUR_BITS else _FINE
        assert relative_l2(weight(model, name), want) < limit < relative_l2(before, want), name
        for key, tensor in kept[name].state_dict().items():
            old = layers_of(plain)[name].state_dict()[key]
            assert (tensor.dtype, tensor.shape) == (old.dtype, old.shape), key
    other = "transformer_blocks.0.attn.img_qkv"
    if other in kept:
        assert torch.equal(weight(model, other), weight(plain, other)), "the LoRA has nothing for it"


@pytest.mark.parametrize("mode", [NONE, "int8_dynamic", "uint4_sdnq"])
def test_a_baked_file_is_what_loading_makes(file: DenoiserFile, merge: Merge, tmp_path: Path, mode: str):
    path = quantize_file(file, mode, tmp_path / "baked.safetensors", loras=merge)
    want = build_denoiser(file, torch.bfloat16, mode=mode, loras=merge).state_dict()
    baked = open_denoiser(path)
    got = build_denoiser(baked, torch.bfloat16).state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name].view(-1).view(torch.uint8), want[name].view(-1).view(torch.uint8)), name
    (told,) = json.loads(baked.checkpoint.metadata["lens.loras"])
    assert (told["file"], told["strength"]) == ("x.safetensors", 0.5)


@pytest.mark.parametrize("layout", ["int8 by row", "sdnq", "Q8_0"])
def test_a_quantised_file_is_baked_as_it_is_quantised(merge: Merge, tmp_path: Path, layout: str):
    path, _ = LAYOUTS[layout](tmp_path / "model" if layout == "sdnq" else tmp_path)
    source = open_denoiser(path)
    baked = quantize_file(source, NONE, tmp_path / "baked.safetensors", loras=merge)
    want = build_denoiser(source, torch.bfloat16, loras=merge)
    got = build_denoiser(open_denoiser(baked), torch.bfloat16)
    assert layers_of(got).keys() == layers_of(want).keys() > {QKV}
    for name in layers_of(want):
        assert torch.equal(weight(got, name), weight(want, name)), name


def test_none_alone_makes_no_file(file: DenoiserFile, tmp_path: Path):
    with pytest.raises(SettingError, match="none with a LoRA, got none"):
        quantize_file(file, NONE, tmp_path / "x.safetensors")


def test_another_strength_is_another_file(file: DenoiserFile, merge: Merge, tmp_path: Path):
    quantize_file(file, NONE, tmp_path / "baked.safetensors", loras=merge)
    other = open_loras([Choice(tmp_path / "x.safetensors", 0.6)], file.sizes)
    with pytest.raises(SettingError, match="exists already"):
        quantize_file(file, NONE, tmp_path / "baked.safetensors", loras=other)


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("x.safetensors", "x.safetensors", 1.0),
        ("x.safetensors:0.8", "x.safetensors", 0.8),
        ("x.safetensors:-1", "x.safetensors", -1.0),
        (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", 1.0),
        (r"C:\loras\x.safetensors:.5", r"C:\loras\x.safetensors", 0.5),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
        ("a:b.safetensors:2", "a:b.safetensors", 2.0),
        ("there:2", "there:2", 1.0),
        ("there:2:3", "there:2", 3.0),
    ],
)
def test_file_and_strength(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, path: str, strength: float
):
    monkeypatch.chdir(tmp_path)
    Path("there:2").touch()
    assert parse_choice(text) == Choice(Path(path), strength)


@pytest.mark.parametrize("text", ["there:", "there:0,8", "there:nan", "away:inf"])
def test_a_strength_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    with pytest.raises(SettingError, match=f"strength of {text.split(':')[0]} must be a .*number, got"):
        parse_choice(text)


def test_generate(
    generate: Generate, merge: Merge, file: DenoiserFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A picture with LoRAs is that of the file baked with them, and its settings and the log name them."""
    caplog.set_level(logging.INFO)
    lora_files.write(tmp_path / "y.safetensors", file.sizes, "LoHa", "LyCORIS", seed=2)
    flags = ("--lora", f"{tmp_path / 'x.safetensors'}:0.5", "--lora", tmp_path / "y.safetensors")
    (picture,) = generate(*PICTURE, *flags, out="with")
    assert read_settings(picture)["lora"] == ["x.safetensors:0.5", "y.safetensors:1"]
    assert "LoRA x.safetensors: matched 3 of 3, strength 0.5, rank 4." in caplog.messages
    (plain,) = generate(*PICTURE, out="without")
    assert "lora" not in read_settings(plain)
    assert pixels(plain) != pixels(picture)


def test_quantize(tiny_folder: Path, merge: Merge, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "cli.safetensors"
    flags = ("--model", tiny_folder, "--out", out, "--quant_transformer", NONE, "--device", "cpu")
    lora = ("--lora", f"{tmp_path / 'x.safetensors'}:0.5")
    assert cli.main([str(flag) for flag in ("quantize", *flags, *lora)]) == 0
    expected = quantize_file(open_denoiser(tiny_folder), NONE, tmp_path / "expected.safetensors", loras=merge)
    assert out.read_bytes() == expected.read_bytes()
    assert capsys.readouterr().out == f"{out}\n"


@pytest.mark.parametrize("command", ["generate", "quantize"])
def test_no_such_lora_is_one_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str, cache_home: Path
):
    given = {
        "generate": ("--repo_id", tiny_folder, "--out", tmp_path / "out", *PICTURE),
        "quantize": (
            "--model",
            tiny_folder,
            "--out",
            tmp_path / "q.safetensors",
            "--quant_transformer",
            NONE,
        ),
    }
    flags = (command, *given[command], "--lora", "nowhere.safetensors:0.5")
    assert cli.main([str(flag) for flag in flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: There is no file nowhere.safetensors.")
    assert not (tmp_path / "out").exists() and not (tmp_path / "q.safetensors").exists()
