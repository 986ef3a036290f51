"""The table of sources holds together, and the example workflows offer the same links."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest

from lens_core.sources import BUNDLES, PUBLISHED, SOURCES, Published, known, published_as, workflow_model
from lens_core.weights import variant_of
from tests.workflow_files import WORKFLOWS, nodes_of

LOADERS = {"LensModelLoader": "denoiser", "LensEncoderLoader": "encoder", "LensVAELoader": "vae"}
MIRRORS = [(key, mirror) for key, source in SOURCES.items() for mirror in source.mirrors]
COMFYUI_FOLDERS = {"diffusion_models", "text_encoders", "vae", "lens"}


@pytest.mark.parametrize(("key", "mirror"), MIRRORS, ids=[f"{key}-{m.repository}" for key, m in MIRRORS])
def test_a_mirror_is_complete_and_stays_below_the_models_folder(key, mirror):
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", mirror.repository)
    assert mirror.directory in COMFYUI_FOLDERS and mirror.gigabytes > 0
    assert mirror.is_folder or len(mirror.paths) == 1
    # A folder's files are found by their path; a single file must not be one.
    assert mirror.is_folder == (len(mirror.paths) > 1 or mirror.paths[0].endswith("/"))
    for path in mirror.paths:
        for name in (path, mirror.local(path)):
            parts = PurePosixPath(name).parts
            assert parts and not name.startswith("/") and ".." not in parts and "\\" not in name
        assert mirror.local(path).startswith(f"{mirror.directory}/")
    if not mirror.is_folder:
        assert mirror.url.startswith("https://huggingface.co/") and "/resolve/main/" in mirror.url


@pytest.mark.parametrize(("place", "published"), PUBLISHED.items(), ids=list(PUBLISHED))
def test_what_is_published_belongs_to_a_mirror(place: str, published: Published):
    assert any(mirror.local(path) == place for _, mirror in MIRRORS for path in mirror.paths)
    assert published.sha256 is None or re.fullmatch("[0-9a-f]{64}", published.sha256)
    (total,) = {round(m.gigabytes, 2) for _, m in MIRRORS if m.place == place} or {None}
    assert total is None or published.size is None or round(published.size / 1e9, 2) == total


def test_bundles_bring_one_of_each_component():
    for name in ("lens-turbo", "lens", "lens-base"):
        assert [SOURCES[key].component for key in BUNDLES[name]] == ["denoiser", "encoder", "vae"]


def test_names_tell_the_variant():
    """Steps and cfg follow the file's or folder's name."""
    for key, mirror in MIRRORS:
        if SOURCES[key].component in ("denoiser", "folder"):
            wanted = "turbo" if "turbo" in key else "base" if "base" in key else "rl"
            assert variant_of(mirror.name) == variant_of(
                {"rl": "lens", "turbo": "Lens-Turbo"}.get(wanted, "Lens-Base")
            )


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("flux2-vae.safetensors", "vae/flux2-vae.safetensors"),
        ("/models/vae/flux2-vae.safetensors", "vae/flux2-vae.safetensors"),
        (r"D:\models\text_encoders\gpt-oss-20b\tokenizer.json", "text_encoders/gpt-oss-20b/tokenizer.json"),
        ("model-00000-of-00002.safetensors", None),
        ("tokenizer.json", None),
        ("another/tokenizer.json", None),
        ("lens_bf16.safetensors", None),
        ("", None),
    ],
)
def test_known_files_by_name_or_path(name: str, place: str | None):
    assert known(name) == (PUBLISHED[place] if place else None)


@pytest.mark.parametrize(
    ("component", "name", "key"),
    [
        ("denoiser", "lens_turbo_bf16.safetensors", "lens-turbo-denoiser"),
        ("denoiser", r"Lens\lens_bf16.safetensors", "lens-denoiser"),
        ("denoiser", "Lens-Turbo", "lens-turbo-folder"),
        ("encoder", "gpt-oss-20b", "encoder-mxfp4"),
        ("encoder", "gpt_oss_20b_nvfp4.safetensors", "encoder"),
        ("vae", "flux2-vae.safetensors", "vae"),
        ("vae", "lens_bf16.safetensors", None),
        ("denoiser", "my_finetune.safetensors", None),
    ],
)
def test_the_source_that_gives_a_file_its_name(component: str, name: str, key: str | None):
    assert published_as(component, name) == key


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_offer_the_links_of_the_table(path: Path):
    nodes = {node["type"]: node for node in nodes_of(path)}
    if "LensGrid" in nodes:  # loads denoisers itself
        grid = nodes["LensGrid"]
        for model in grid["properties"]["models"]:
            assert model["name"] in grid["widgets_values"]
            assert model == workflow_model(SOURCES[published_as("denoiser", model["name"])].mirrors[0])
    loaders = {kind: nodes[kind] for kind in LOADERS if kind in nodes}
    assert loaders.keys() == LOADERS.keys() - ({"LensModelLoader"} if "LensGrid" in nodes else set())
    if path.stem.startswith("Lens nano"):
        # In the pack itself: the page must not offer a download.
        assert all(node["widgets_values"][0] == "nano/lens" for node in loaders.values())
        assert not any("models" in node["properties"] for node in loaders.values())
        return
    for kind, node in loaders.items():
        key = published_as(LOADERS[kind], node["widgets_values"][0])
        assert key is not None
        mirror = SOURCES[key].mirrors[0]
        if mirror.is_folder:  # for which the page has no way of downloading: the note names the command
            assert "models" not in node["properties"]
            continue
        assert node["properties"]["models"] == [workflow_model(mirror)]
        # The page downloads nothing else, and calls no other value a model file.
        assert node["properties"]["models"][0]["url"].endswith(".safetensors")
