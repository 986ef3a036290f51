"""Which published checkpoint a file or folder is, by its metadata, its name and where it lies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lens_core.config import LENS, LENS_BASE, LENS_TURBO, Variant
from lens_core.weights import variant_at, variant_metadata

# Names under which the checkpoints are in circulation, files below a hub's cache folders included.
PUBLISHED = [
    ("diffusion_models/lens_bf16.safetensors", LENS),
    ("diffusion_models/lens_mxfp8.safetensors", LENS),
    ("diffusion_models/lens_turbo_bf16.safetensors", LENS_TURBO),
    ("diffusion_models/lens_turbo_mxfp8.safetensors", LENS_TURBO),
    ("lens/Lens", LENS),
    ("lens/Lens/transformer", LENS),
    ("lens/Lens-Turbo/transformer", LENS_TURBO),
    ("lens/Lens-Base/transformer", LENS_BASE),
    ("diffusers/YuCollection/Lens-Diffusers", LENS),
    ("diffusers/YuCollection/Lens-Turbo-Diffusers", LENS_TURBO),
    ("diffusers/YuCollection/Lens-Base-Diffusers/transformer", LENS_BASE),
    ("diffusion_models/Lens-SDNQ-uint4-static/transformer", LENS),
    ("diffusion_models/Lens-Turbo-SDNQ-uint4-static/transformer", LENS_TURBO),
    ("diffusion_models/lens-turbo-q4_K.gguf", LENS_TURBO),
    ("diffusion_models/lens-base-mxfp8/lens_base_mxfp8.safetensors", LENS_BASE),
    ("models--Jinstudio--Lens-Base/snapshots/0123abcd/transformer", LENS_BASE),
    ("models--Jinstudio--Lens-Turbo/snapshots/0123abcd", LENS_TURBO),
    ("models--Comfy-Org--Lens/snapshots/0123abcd/diffusion_models/lens_turbo_bf16.safetensors", LENS_TURBO),
    ("lens/Lens-Turbo/transformer/diffusion_pytorch_model.safetensors", LENS_TURBO),
    # A name that speaks of Lens outweighs the folders around it; others of no meaning tell nothing.
    ("Lens-Turbo-things/lens_bf16.safetensors", LENS),
    ("base/turbo/models/diffusion_models/style_merge.safetensors", LENS),
    ("diffusion_models/my_turbo.safetensors", LENS_TURBO),
]


@pytest.mark.parametrize(("name", "variant"), PUBLISHED)
def test_published_names(tmp_path: Path, name: str, variant: Variant):
    assert variant_at(tmp_path / name) == variant
    assert variant_at(tmp_path / name, {"lens.variant": "Lens-Base"}) == LENS_BASE, "metadata come first"


@pytest.mark.parametrize("file", ["model_index.json", "config.json", "transformer/config.json"])
def test_a_renamed_folder_tells_by_its_configuration(tmp_path: Path, file: str):
    folder = tmp_path / "my_favourite"
    (folder / "transformer").mkdir(parents=True)
    (folder / file).write_text(json.dumps({"_name_or_path": "microsoft/Lens-Turbo"}), encoding="utf-8")
    assert variant_at(folder / "transformer") == LENS_TURBO
    if not file.startswith("transformer"):
        assert variant_at(folder) == LENS_TURBO


@pytest.mark.parametrize("content", ["{", "[]", '{"_name_or_path": 7}', '{"_name_or_path": "/mnt/base/x"}'])
def test_a_configuration_that_tells_nothing_is_passed_over(tmp_path: Path, content: str):
    folder = tmp_path / "Lens-Base-copy" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content, encoding="utf-8")
    assert variant_at(folder) == LENS_BASE, "the folder around it tells"


def test_a_link_counts_by_its_own_name_and_by_what_it_leads_to(tmp_path: Path):
    blob = tmp_path / "0123abcd"
    blob.mkdir()
    (tmp_path / "Lens-Base").symlink_to(blob)
    (tmp_path / "models--x--Lens-Turbo").mkdir()
    (tmp_path / "models--x--Lens-Turbo" / "0123").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "models--x--Lens-Turbo" / "0123")
    assert variant_at(tmp_path / "Lens-Base") == LENS_BASE
    assert variant_at(tmp_path / "current") == LENS_TURBO


@pytest.mark.parametrize("published", [LENS, LENS_TURBO, LENS_BASE], ids=lambda variant: variant.name)
@pytest.mark.parametrize("settings", [{}, {"cfg": 2.0}, {"steps": 8, "cfg": 1.5}], ids=str)
def test_a_checkpoint_may_carry_settings_of_its_own(tmp_path: Path, published: Variant, settings: dict):
    variant = replace(published, **settings)
    told = variant_metadata(variant)
    assert variant_at(tmp_path / "renamed.safetensors", told) == variant
    assert len(told) == 1 + len(settings), "what is as published is not repeated"


@pytest.mark.parametrize("steps", ["", "0", "-4", "1001", "nan", "inf", "many", "1e99", None])
@pytest.mark.parametrize("cfg", ["", "-1", "101", "nan", "inf", "much", None])
def test_settings_that_no_sampler_takes_are_left_out(tmp_path: Path, steps: str, cfg: str):
    told = {"lens.variant": "Lens-Turbo", "lens.steps": steps, "lens.cfg": cfg}
    assert variant_at(tmp_path / "x.safetensors", told) == LENS_TURBO
