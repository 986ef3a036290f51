"""The command that makes ComfyUI's own Lens nodes this pack's, on ComfyUI's own Lens templates."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
from PIL import Image

from tests.browser.lens_page import LensPage, one_renderer

COMMAND = "Lens.UseOwnNodes"
# Checkpoint, steps and cfg of each.
TEMPLATES = {
    "image_lens_t2i": ("lens_bf16.safetensors", 20, 5),
    "image_lens_turbo_t2i": ("lens_turbo_bf16.safetensors", 4, 1),
}
STOCK = {"UNETLoader", "CLIPLoader", "VAELoader", "CLIPTextEncode", "SamplerCustom", "VAEDecode", "CFGNorm"}
OURS = [
    "LensEncoderLoader",
    "LensModelLoader",
    "LensSampler",
    "LensTextEncode",
    "LensVAEDecode",
    "LensVAELoader",
]


def template(name: str) -> dict[str, Any]:
    """A template as ComfyUI brings it."""
    path = files("comfyui_workflow_templates_json") / "templates" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@one_renderer
@pytest.mark.parametrize("name", TEMPLATES)
def test_comfyuis_own_template_becomes_ours(page: LensPage, name: str):
    page.load(template(name))
    before = page.node_types()
    assert set(before) >= STOCK
    page.command(COMMAND)
    page.page.wait_for_selector(".p-toast-message")
    assert [text for text in page.toasts() if "6 nodes are this pack's now" in text]

    after = page.node_types()
    page.command("Comfy.Undo")
    assert page.node_types() == before
    page.command("Comfy.Redo")
    assert page.node_types() == after
    assert [kind for kind in after if kind.startswith("Lens")] == OURS
    assert not {*STOCK, "ModelSamplingFlux", "BasicScheduler", "KSamplerSelect"} & set(after)
    file, steps, cfg = TEMPLATES[name]
    assert page.widget("LensModelLoader", "model_name") == file
    assert (page.widget("LensSampler", "steps"), page.widget("LensSampler", "cfg")) == (steps, cfg)
    assert page.widget("LensTextEncode", "prompt") == page_prompt(template(name))


def test_what_became_ours_draws(page: LensPage):
    page.load(template("image_lens_turbo_t2i"))
    page.command(COMMAND)
    page.set_widgets("ResolutionSelector", megapixels=0.1)
    page.use_tiny_models()
    page.set_promoted(
        unet_name="lens_turbo_tiny_bf16.safetensors",
        clip_name="gpt_oss_tiny_mxfp4.safetensors",
        vae_name="flux2_tiny_vae.safetensors",
    )
    run = page.run()
    assert run.status == "success", run.error
    (picture,) = page.pictures(run)
    with Image.open(picture) as image:  # the size that the template's own nodes chose, in Lens' multiples
        assert image.size == (320, 320)


def page_prompt(workflow: dict[str, Any]) -> str:
    """The prompt inside a template."""
    nodes = workflow["definitions"]["subgraphs"][0]["nodes"]
    return next(node for node in nodes if node["id"] == 3)["widgets_values"][0]


@one_renderer
def test_other_peoples_graphs_stay_as_they_are(page: LensPage):
    page.load(template("image_z_image_turbo"))
    before = page.graph()["nodes"], page.graph()["links"]
    page.command(COMMAND)
    page.page.wait_for_selector(".p-toast-message")
    assert any("No nodes of ComfyUI's own Lens" in text for text in page.toasts())
    assert (page.graph()["nodes"], page.graph()["links"]) == before
