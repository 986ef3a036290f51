"""What the loaders' lists offer: every file and folder that a loader takes, and nothing else."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import denoiser_gguf
from tests.core.test_kind import PREFIXES, all_in_one
from tests.core.test_wrong_files import OTHER_MODELS
from tests.host.conftest import PROMPT
from tests.host.test_nodes import choices

LOADERS = {"denoiser": "LensModelLoader", "encoder": "LensEncoderLoader", "vae": "LensVAELoader"}
BF16 = "diffusion_models/lens_tiny_bf16.safetensors"


@pytest.fixture
def models(host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A models folder with nothing in it, the only one that ComfyUI searches."""
    import folder_paths

    for key in ("diffusion_models", "text_encoders", "vae", "checkpoints", "lens", "diffusers"):
        (tmp_path / key).mkdir()
        _, extensions = folder_paths.folder_names_and_paths[key]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path / key)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture(autouse=True)
def _no_kinds_remembered(host) -> Iterator[None]:
    yield
    host.module("nodes.host.kinds")._kinds.cache_clear()


def lists(host) -> dict[str, list[str]]:
    """Without the option that says that there is none."""
    none = host.module("nodes.host.missing").NONE_YET
    return {
        component: [name for name in choices(host, node_id) if name != none]
        for component, node_id in LOADERS.items()
    }


def test_each_list_has_what_its_loader_takes(host, models: Path, tiny_models: Path, tiny_folder: Path):
    for key in ("diffusion_models", "text_encoders", "vae"):  # everything into every folder
        shutil.copy(tiny_models / BF16, models / key / "lens_bf16.safetensors")
        shutil.copy(tiny_models / "text_encoders" / "gpt_oss_tiny_nvfp4.safetensors", models / key)
        shutil.copy(tiny_models / "vae" / "flux2_tiny_vae.safetensors", models / key)
        for index, names in enumerate(OTHER_MODELS.values()):
            other = {name: torch.zeros(2, 2) for name in names}
            save_file(other, models / key / f"other_{index}.safetensors")
    denoiser_gguf.write_denoiser(models / "diffusion_models" / "lens-q8_0.gguf", "Q8_0")
    all_in_one(tiny_models, models / "checkpoints" / "lens_all.safetensors", PREFIXES[0])
    shutil.copytree(tiny_folder, models / "lens" / "Lens")
    shutil.copytree(tiny_folder, models / "diffusers" / "YuCollection" / "Lens-Turbo-Diffusers")
    shutil.copytree(tiny_folder / "transformer", models / "diffusion_models" / "lens-f32")
    shutil.copytree(tiny_folder / "transformer", models / "diffusion_models" / "Lens-Base" / "transformer")
    shutil.copytree(tiny_folder / "text_encoder", models / "text_encoders" / "gpt-oss-20b")
    whole = ["Lens", os.path.join("YuCollection", "Lens-Turbo-Diffusers")]
    base = os.path.join("Lens-Base", "transformer")
    assert lists(host) == {
        "denoiser": [
            "lens_bf16.safetensors",
            "lens-q8_0.gguf",
            "lens_all.safetensors",
            *(base, "lens-f32"),
            *whole,
        ],
        "encoder": ["gpt_oss_tiny_nvfp4.safetensors", "lens_all.safetensors", "gpt-oss-20b", *whole],
        "vae": ["flux2_tiny_vae.safetensors", "lens_all.safetensors", *whole],
    }
    assert choices(host, "LensQuantizeModel") == choices(host, "LensModelLoader")
    for name in (base, "lens-f32", "lens_all.safetensors", *whole):
        _, steps, _ = host.run("LensModelLoader", model_name=name, dtype="auto")
        assert steps == {base: 50, whole[1]: 4}.get(name, 20), name


def test_shards_are_never_listed_alone(host, models: Path, tiny_folder: Path):
    for key, part in (("diffusion_models", "transformer"), ("text_encoders", "text_encoder")):
        for shard in (tiny_folder / part).glob("*-of-*"):
            shutil.copy(shard, models / key)
            shutil.copy(shard, models / "checkpoints")
    assert lists(host) == {"denoiser": [], "encoder": [], "vae": []}


def test_what_cannot_be_opened_is_left_out_and_logged_once(
    host, models: Path, tiny_models: Path, tiny_folder: Path, caplog: pytest.LogCaptureFixture
):
    cut = models / "diffusion_models" / "cut.safetensors"
    content = (tiny_models / BF16).read_bytes()
    cut.write_bytes(content[:-1])
    torch.save({}, models / "vae" / "pickled.pt")
    shutil.copytree(tiny_folder / "transformer", models / "lens" / "Broken" / "transformer")
    next((models / "lens" / "Broken" / "transformer").glob("*-00002-*")).unlink()
    with caplog.at_level(logging.WARNING):
        assert lists(host) == lists(host) == {"denoiser": [], "encoder": [], "vae": []}
    said = [record.message for record in caplog.records if "not in the loaders' lists" in record.message]
    assert len(said) == 3
    for words in (
        "cut.safetensors is cut short",
        "pickled.pt is a zip archive",
        "missing: diffusion_",
    ):
        assert sum(words in line for line in said) == 1
    cut.write_bytes(content)
    assert lists(host)["denoiser"] == ["cut.safetensors"], "it has been downloaded again"


def test_a_name_that_is_not_listed_is_found_and_named_as_what_it_is(host, models: Path):
    flux = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}
    for folder, name in (("vae", "flux.safetensors"), ("checkpoints", "x.safetensors")):
        save_file(flux, models / folder / name)
        with pytest.raises(Exception, match=rf"{name} is a FLUX denoiser; expected a FLUX\.2 VAE"):
            host.run("LensVAELoader", vae_name=name)


def test_files_are_looked_at_once_until_they_change(
    host, models: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
):
    kinds = host.module("nodes.host.kinds")
    looked: list[str] = []

    def inspect(path: Path):
        looked.append(path.name)
        return original(path)

    original = kinds.inspect
    monkeypatch.setattr(kinds, "inspect", inspect)
    target = models / "diffusion_models" / "a.safetensors"
    shutil.copy(tiny_models / BF16, target)
    for _ in range(3):
        assert lists(host)["denoiser"] == ["a.safetensors"]
    assert looked == ["a.safetensors"]
    save_file(load_file(tiny_models / "vae" / "flux2_tiny_vae.safetensors"), target)
    assert lists(host)["denoiser"] == []
    assert looked == ["a.safetensors"] * 2


def test_of_two_files_of_one_name_the_components_own_folder_counts(host, models: Path, tiny_models: Path):
    all_in_one(tiny_models, models / "checkpoints" / "lens.safetensors", PREFIXES[0])
    shutil.copy(tiny_models / BF16, models / "diffusion_models" / "lens.safetensors")
    assert lists(host) == {component: ["lens.safetensors"] for component in LOADERS}
    found = host.module("nodes.host.paths").path_of("denoiser", "lens.safetensors")
    assert found == models / "diffusion_models" / "lens.safetensors"
    found = host.module("nodes.host.paths").path_of("vae", "lens.safetensors")
    assert found == models / "checkpoints" / "lens.safetensors"


def test_comfyuis_own_all_in_one_file(host, tiny, models: Path, draw):
    """As its CheckpointSave writes it: each loader takes its part out of it."""
    import comfy.sd

    path = models / "checkpoints" / "mine.safetensors"
    comfy.sd.save_checkpoint(str(path), tiny.model, tiny.clip, tiny.vae)
    assert lists(host) == {component: [path.name] for component in LOADERS}
    model, *_ = host.run("LensModelLoader", model_name=path.name, dtype="float32")
    (clip,) = host.run("LensEncoderLoader", encoder_name=path.name, feature_cache=False)
    (vae,) = host.run("LensVAELoader", vae_name=path.name)
    positive, negative = host.run("LensTextEncode", clip=clip, prompt=PROMPT, negative="")
    latent = draw(model=model, positive=positive, negative=negative)
    assert torch.equal(latent["samples"], draw()["samples"])
    pictures = [host.run("LensVAEDecode", latent=latent, vae=one)[0] for one in (vae, tiny.vae)]
    assert torch.equal(*pictures)
