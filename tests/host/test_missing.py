"""A loader whose file is not there says which, how large, from where, into which folder, and the command."""

from __future__ import annotations

import pytest

from lens_core.sources import SOURCES

NODES = {
    "denoiser": [("LensModelLoader", "model_name"), ("LensQuantizeModel", "model_name")],
    "encoder": [("LensEncoderLoader", "encoder_name")],
    "vae": [("LensVAELoader", "vae_name")],
}
PUBLISHED_NAMES = [
    ("denoiser", "lens_turbo_bf16.safetensors", "lens-turbo-denoiser"),
    ("denoiser", "Lens-Base", "lens-base-denoiser"),
    ("encoder", "gpt_oss_20b_nvfp4.safetensors", "encoder"),
    ("encoder", "gpt-oss-20b", "encoder-mxfp4"),
    ("vae", "flux2-vae.safetensors", "vae"),
]


def check(host, component: str, name: object) -> bool | str:
    """What the nodes of a component say of a choice; all say the same."""
    (said,) = {host.node_classes[node].validate_inputs(**{key: name}) for node, key in NODES[component]}
    return said


@pytest.mark.parametrize(("component", "name", "key"), PUBLISHED_NAMES)
def test_a_published_file_comes_with_all_that_is_needed_to_get_it(host, component, name, key):
    import folder_paths

    said = check(host, component, name)
    mirror = SOURCES[key].mirrors[0]
    folder = folder_paths.get_folder_paths(mirror.directory)[0]
    command = f"-m lens_core download {key} --to {folder_paths.models_dir}"
    for part in (
        name,
        f"{mirror.gigabytes:.2f} GB",
        mirror.url,
        folder,
        command,
        "press R",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("denoiser", "lens_tiny_bf16.safetensors"),
        ("denoiser", "Lens-tiny"),
        ("encoder", "gpt_oss_tiny_mxfp4.safetensors"),
        ("vae", "flux2_tiny_vae.safetensors"),
        ("vae", None),
    ],
)
def test_what_is_there_passes_and_so_does_a_link(host, component, name):
    assert check(host, component, name) is True


@pytest.mark.parametrize("name", ["mine.safetensors", "", "../../secret.safetensors", 5, {"a": 1}, "\0"])
def test_a_name_of_ones_own_gets_the_list(host, name):
    said = check(host, "denoiser", name)
    assert repr(str(name)) in said and "lens_tiny_bf16.safetensors" in said and "https" not in said


@pytest.mark.parametrize("component", NODES)
def test_an_empty_list_has_an_option_that_leads_to_the_usual_file(host, monkeypatch, component):
    paths, missing = host.module("nodes.host.paths"), host.module("nodes.host.missing")
    monkeypatch.setattr(paths, "_singles", lambda component: {})
    monkeypatch.setattr(paths, "_folders", lambda component: {})
    assert paths.choices(component) == [missing.NONE_YET]
    usual = SOURCES[missing.USUAL[component]].mirrors[0]
    for name in (missing.NONE_YET, "mine.safetensors"):
        said = check(host, component, name)
        assert usual.name in said and usual.url in said and "press R" in said


def test_folders_of_extra_model_paths_are_named_and_those_for_other_things_are_not(host, monkeypatch):
    import folder_paths

    models, output = folder_paths.models_dir, folder_paths.get_output_directory()
    roots = [
        f"{models}/unet",
        f"{models}/diffusion_models",
        "/elsewhere/denoisers",
        f"{output}/diffusion_models",
    ]
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda key: roots)
    said = check(host, "denoiser", "lens_bf16.safetensors")
    assert f" into {models}/diffusion_models or /elsewhere/denoisers, or run" in said
