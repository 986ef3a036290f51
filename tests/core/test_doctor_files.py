"""What the doctor finds in files and folders: sound ones, damaged ones, other models', wrong hashes."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lens_core import sources
from lens_core.doctor import Finding, files
from lens_core.sources import Published
from tests import denoiser_gguf, denoiser_quantized

DENOISER = "diffusion_models/lens_turbo_tiny_bf16.safetensors"


def look(*paths: Path, **options: bool) -> files.Files:
    """All findings on these paths."""
    found = files.Files()
    for item in files.find(paths):
        files.examine(item, found, on_progress=lambda *_: None, **options)
    return found


def one(path: Path, **options: bool) -> Finding:
    (finding,) = look(path, **options).findings
    return finding


@pytest.fixture
def denoiser(tiny_models: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copy(tiny_models / DENOISER, tmp_path))


def test_every_component_of_a_models_folder_is_found_once(tiny_models: Path):
    found = look(tiny_models)
    assert [finding for finding in found.findings if finding.broken] == []
    labels = [finding.name for finding in found.findings]
    assert len(set(labels)) == len(labels) and {
        "lens_turbo_tiny_bf16.safetensors",
        "gpt_oss_tiny_nvfp4.safetensors",
        "flux2_tiny_vae.safetensors",
        "Lens-tiny/transformer",
        "Lens-tiny/text_encoder",
        "Lens-tiny/vae",
    } < set(labels)
    turbo = found.findings[labels.index("lens_turbo_tiny_bf16.safetensors")]
    assert turbo.text.startswith("ok: a Lens denoiser, Lens-Turbo, BF16, single file, ")
    assert "F32, folder of 2 shards" in found.findings[labels.index("Lens-tiny/transformer")].text
    assert len(found.components) == len(labels)


def test_an_all_in_one_file_gives_its_parts(tiny_models: Path, tmp_path: Path):
    parts = {
        "model.diffusion_model.": tiny_models / DENOISER,
        "first_stage_model.": tiny_models / "vae" / "flux2_tiny_vae.safetensors",
    }
    tensors = {prefix + name: x for prefix, path in parts.items() for name, x in load_file(path).items()}
    save_file(tensors, tmp_path / "all.safetensors")
    found = look(tmp_path / "all.safetensors", values=True, hashes=True)
    assert [kind.component for kind, _ in found.components] == ["denoiser", "vae"]
    assert sum("SHA-256" in finding.text for finding in found.findings) == 1


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def without(path: Path) -> None:
    tensors = load_file(path)
    del tensors["transformer_blocks.1.img_mlp.w2.weight"]
    save_file(tensors, path)


def other_shape(path: Path) -> None:
    tensors = load_file(path)
    tensors["transformer_blocks.1.img_mlp.w2.weight"] = torch.zeros(3, 4)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, "is cut short"),
        (without, "Missing (1): transformer_blocks.1.img_mlp.w2.weight"),
        (other_shape, "Wrong shape (1): transformer_blocks.1.img_mlp.w2.weight"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is a Python pickle"),
        (lambda path: path.write_bytes(b""), "damaged or no safetensors file"),
        (lambda path: path.unlink(), "There is no file"),
    ],
    ids=["cut", "missing", "shape", "pickle", "empty", "gone"],
)
def test_a_damaged_file_is_broken_and_says_how(spoil: Callable[[Path], None], said: str, denoiser: Path):
    spoil(denoiser)
    finding = one(denoiser)
    assert finding.broken and said in finding.text and "\n" not in finding.text


def test_a_missing_shard_is_broken_in_its_folder_alone(tiny_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "Lens"))
    next(folder.glob("transformer/*-00001-of-*")).unlink()
    found = look(tmp_path).findings
    assert [(x.name, "missing: diffusion_pytorch_model-00001" in x.text) for x in found if x.broken] == [
        ("Lens/transformer", True)
    ]
    assert len(found) == 3


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_found_where_numbers_are_read(number: float, denoiser: Path):
    tensors = load_file(denoiser)
    tensors["transformer_blocks.2.attn.img_qkv.weight"][-1, -1] = number
    tensors["proj_out.bias"].zero_()
    save_file(tensors, denoiser)
    assert not one(denoiser).broken
    finding = one(denoiser, values=True)
    assert finding.broken
    assert (
        "NaN or infinite numbers in 1 of its tensors (transformer_blocks.2.attn.img_qkv.wei" in finding.text
    )


def test_zeros_are_said_and_no_fault(denoiser: Path):
    tensors = load_file(denoiser)
    tensors["proj_out.bias"].zero_()
    save_file(tensors, denoiser)
    finding = one(denoiser, values=True)
    assert not finding.broken and "nothing but zeros in 1 of its tensors (proj_out.bias)" in finding.text


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
def test_a_gguf_and_its_numbers(kind: str, tmp_path: Path):
    path = tmp_path / "lens.gguf"
    denoiser_gguf.write_denoiser(path, kind)
    finding = one(path, values=True)
    assert not finding.broken and kind in finding.text and "GGUF" in finding.text
    assert "all numbers finite" in finding.text
    damaged = bytearray(path.read_bytes())
    # Somewhere in the last tensors: of whatever type, 600 bytes of 0xFF hold a scale that is no number.
    damaged[-100_000:-99_400] = b"\xff" * 600
    path.write_bytes(damaged)
    assert one(path, values=True).broken


def test_eight_bit_floats_are_read_too(tmp_path: Path):
    path = tmp_path / "lens_fp8.safetensors"
    denoiser_quantized.write_scaled(path)
    assert "fp8 with scales" in one(path, values=True).text
    tensors = load_file(path)
    name = next(
        name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn and tensor.ndim == 2
    )
    tensors[name].view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, path)
    assert one(path, values=True).broken


def test_other_models_are_named_or_counted(tiny_models: Path, tmp_path: Path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "flux.safetensors")
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    assert one(tmp_path / "flux.safetensors").text.startswith("a FLUX denoiser")
    assert "no part of Lens" in one(tmp_path / "flux.safetensors").text
    assert not one(tmp_path / "flux.safetensors").broken
    found = look(tmp_path)
    assert (found.findings, found.others, found.loras) == ([], 1, 1)


def test_links_in_a_circle_end(tmp_path: Path, tiny_models: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    shutil.copy(tiny_models / DENOISER, tmp_path / "a")
    assert len(look(tmp_path).findings) == 1


def test_the_home_folders_name_is_not_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "joe"))
    assert files.Item(tmp_path / "joe" / "vae").label == "~/vae"
    assert files.Item(tmp_path / "joe" / "Lens" / "vae").label == "Lens/vae"


@pytest.mark.parametrize("right", [True, False])
def test_a_hash_is_compared_with_the_published_one(
    right: bool, denoiser: Path, monkeypatch: pytest.MonkeyPatch
):
    digest = hashlib.sha256(denoiser.read_bytes()).hexdigest()
    wanted = digest if right else digest[::-1]
    monkeypatch.setitem(sources.PUBLISHED, f"diffusion_models/{denoiser.name}", Published(sha256=wanted))
    kind, finding = look(denoiser, hashes=True).findings
    assert not kind.broken and finding.broken is not right
    assert digest in finding.text and wanted in finding.text
    assert ("as published" in finding.text) is right


def test_a_file_that_nobody_published_has_its_hash(denoiser: Path):
    _, finding = look(denoiser, hashes=True).findings
    assert hashlib.sha256(denoiser.read_bytes()).hexdigest() in finding.text and not finding.broken
