"""Every example workflow runs on a real server, and its picture carries a workflow that runs again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.comfy_server import PACK, ComfyServer, error_of
from scripts.demo_run import NANO_WORKFLOW, TINY
from scripts.workflow import NOTES, set_input, to_prompt

WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
SIZES = {"1:1": (256, 256), "4:3": (304, 224), "3:2": (320, 208), "16:9": (336, 192)}
# A second pass is larger than the first.
LARGER = {"1:1": (512, 512), "4:3": (576, 432), "3:2": (624, 416)}
NANO_SIZE = (304, 224)
# The picture that LoadImage gets, at the example's 4:3, and the square of it that is masked (transparent).
GIVEN_SIZE, MASKED = (800, 600), (slice(200, 350), slice(300, 500))


def test_there_are_example_workflows():
    assert len(WORKFLOWS) >= 3


def within_reach(prompt: dict) -> tuple[int, int]:
    """Replace the published files and size, which a test machine has not; returns the picture's size, or a
    part of a sheet's."""
    for node, values in TINY.items():
        set_input(prompt, node, **values)
    set_input(prompt, "LensReasoner", max_new_tokens=16, effort="none")
    set_input(prompt, "LensGrid", base_resolution="256", aspect_ratio="2:1", steps=1)
    kinds = {node["class_type"]: node["inputs"] for node in prompt.values()}
    set_input(prompt, "LensEmptyLatent", base_resolution="256")
    set_input(prompt, "LensImageToLatent", base_resolution="512")
    if "LensGrid" in kinds:
        return (2 * 352, 4 * 176)
    sizes = LARGER if "LensImageToLatent" in kinds else SIZES
    return sizes[kinds["LensEmptyLatent"]["aspect_ratio"] if "LensEmptyLatent" in kinds else "4:3"]


@pytest.fixture(scope="module", autouse=True)
def given_picture(server: ComfyServer) -> Path:
    """example.png in the input folder, as ComfyUI brings one."""
    pixels = np.random.default_rng(0).integers(0, 256, (*GIVEN_SIZE[::-1], 4), np.uint8)
    pixels[..., 3] = 255
    pixels[(*MASKED, 3)] = 0
    path = server.base / "input" / "example.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflow_draws_and_loads_again(server: ComfyServer, path: Path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    info = server.get("/api/object_info")
    prompt = to_prompt(workflow, info)
    size = NANO_SIZE if path == NANO_WORKFLOW else within_reach(prompt)

    entry = server.wait(server.queue(prompt, workflow))
    assert error_of(entry) is None
    (saved,) = server.images(entry)
    with Image.open(saved) as image:
        assert image.size == size or (path.stem == "Lens - grid" and image.size > size)
        assert np.asarray(image).std() > 5, "a flat picture"
        embedded, embedded_prompt = json.loads(image.text["workflow"]), json.loads(image.text["prompt"])

    assert embedded == workflow
    again = to_prompt(embedded, info)
    assert {n["class_type"] for n in again.values()} == {n["class_type"] for n in prompt.values()}
    for node in embedded_prompt.values():
        node.pop("is_changed", None)  # ComfyUI's note of what fingerprint_inputs said
    assert embedded_prompt == prompt
    # Another seed, so that the server cannot answer from its cache.
    for kind in ("LensSampler", "LensNoise"):
        set_input(embedded_prompt, kind, seed=43)
    set_input(embedded_prompt, "LensGrid", seeds="43-44")
    second = server.wait(server.queue(embedded_prompt, embedded))
    assert error_of(second) is None
    (other,) = server.images(second)
    changed = np.any(np.asarray(Image.open(other)) != np.asarray(Image.open(saved)), axis=-1)
    assert changed.any()
    # A sixteenth of the picture is masked, a little more in whole tokens; the rest is the given one's.
    assert (changed.mean() < 0.1) == (path.stem == "Lens - inpaint")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflow_is_well_formed(server: ComfyServer, path: Path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    info = server.get("/api/object_info")
    ours = [node for node in workflow["nodes"] if node["type"].startswith("Lens")]
    for node in workflow["nodes"]:
        assert node["type"] in info or node["type"] in NOTES
    for node in ours:
        assert node["properties"]["cnr_id"] == "lenspack"
        names = [
            *info[node["type"]]["input"].get("required", {}),
            *info[node["type"]]["input"].get("optional", {}),
        ]
        assert all(slot["name"] in names for slot in node["inputs"])
        assert [slot["name"] for slot in node["outputs"]] == info[node["type"]]["output_name"]
        for model in node["properties"].get("models", ()):
            assert model["name"] in node["widgets_values"], "the page looks the widget's value up"
    # What comes with the pack is not to be downloaded.
    assert any(node["properties"].get("models") for node in ours) == (path != NANO_WORKFLOW)


def test_swapping_the_checkpoint_runs_what_it_changes_alone(server: ComfyServer, picture_prompt):
    """The wired sampler takes the checkpoint's own steps; encoder, VAE and encoded prompt are used again."""
    server.free()
    kept = {"encoder", "vae", "text", "size"}
    settings = {"sampler__steps": ["model", 1], "sampler__cfg": ["model", 2]}
    names = {"lens_turbo_tiny_bf16": 4, "lens_tiny_bf16": 20, "Lens-Turbo-tiny": 4}
    for number, (name, steps) in enumerate(names.items()):
        model = name if name == "Lens-Turbo-tiny" else f"{name}.safetensors"
        prompt = picture_prompt(model__model_name=model, **settings)
        before = len(server.log.read_text(errors="replace"))
        entry = server.wait(server.queue(prompt))
        assert error_of(entry) is None, str(error_of(entry))
        assert f"{steps}/{steps}" in server.log.read_text(errors="replace")[before:]
        messages = dict(entry["status"]["messages"])
        assert kept & set(messages["execution_cached"]["nodes"]) == (kept if number else set())
        assert not {"model", "sampler", "decode"} & set(messages["execution_cached"]["nodes"])
