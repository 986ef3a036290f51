"""The memory badge on loader and sampler, and the lines that nodes show while they work, in a real page."""

from __future__ import annotations

import json
import re

from playwright.sync_api import expect

from scripts.comfy_server import PACK
from tests.browser.lens_page import LensPage, one_renderer

WORKFLOW = PACK / "example_workflows" / "Lens - text to image.json"
CPU = re.compile(r"^✓ CPU: needs about \d+\.\d GB of \d+\.\d GB memory$")
RED = {
    "level": "red",
    "needed": 2,
    "least": 1,
    "line": "✗ 9.8 GB of 1.0 GB free: too little, even streamed",
    "details": ["For 1 x 1024x1024: the denoiser.", "With quantization uint4_sdnq it fits whole."],
}


def by_node(page: LensPage, node_type: str) -> dict[str, str]:
    """Text, tooltip and level of a node's badge."""
    return page.page.evaluate(
        """(type) => {
             const node = app.rootGraph.nodes.find((node) => node.type === type);
             const {element} = node.widgets.find((widget) => widget.name === "memory_badge");
             return {text: element.textContent, title: element.title, level: element.dataset.level};
           }""",
        node_type,
    )


def wait_for(page: LensPage, node_type: str, part: str) -> dict[str, str]:
    """The badge once its tooltip has ``part``."""
    page.page.wait_for_function(
        """([type, part]) => {
             const node = app.rootGraph.nodes.find((node) => node.type === type);
             const {element} = node.widgets.find((widget) => widget.name === "memory_badge");
             return part ? element.title.includes(part) : element.textContent === "";
           }""",
        arg=[node_type, part],
        timeout=10000,
    )
    return by_node(page, node_type)


def test_the_badge_follows_the_choices(page: LensPage):
    page.load(WORKFLOW)
    page.use_tiny_models()
    loader = wait_for(page, "LensModelLoader", "For 1 x 1024x1024: the denoiser;")
    assert CPU.match(loader["text"]) and loader["level"] == "green"
    sampler = wait_for(page, "LensSampler", "For 1 x 256x256: the text encoder and the denoiser;")
    assert CPU.match(sampler["text"]) and "encoding" in sampler["title"]
    expect(page.page.locator(".lens-memory").filter(has_text="CPU: needs about")).to_have_count(2)

    page.set_widgets("LensEmptyLatent", aspect_ratio="16:9", batch_size=3)
    assert "For 3 x 336x192" in wait_for(page, "LensSampler", "For 3 x 336x192")["title"]
    page.page.evaluate(
        """() => { const node = app.rootGraph.nodes.find((node) => node.type === "LensSampler");
                   node.disconnectInput(node.findInputSlot("model")); }"""
    )
    assert wait_for(page, "LensSampler", "") == {"text": "", "title": "", "level": ""}


@one_renderer
def test_the_badge_is_in_neither_prompt_nor_file(page: LensPage):
    page.load(WORKFLOW)
    page.use_tiny_models()
    wait_for(page, "LensSampler", "For 1")
    prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
    saved = json.dumps(page.graph())
    assert "memory_badge" not in json.dumps(prompt) and "CPU: needs" not in saved
    by_type = {node["type"]: node for node in page.graph()["nodes"]}
    assert len(by_type["LensModelLoader"]["widgets_values"]) == 3


def test_too_little_is_said_in_words_and_colour(page: LensPage):
    page.page.route("**/lens/memory?*", lambda route: route.fulfill(json=RED))
    try:
        page.load(WORKFLOW)
        page.use_tiny_models()
        page.page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
        red = wait_for(page, "LensModelLoader", "With quantization uint4_sdnq")
        assert red == {"text": RED["line"], "title": "\n".join(RED["details"]), "level": "red"}
        page.screenshot(f"badge-red-{page.renderer}")
    finally:
        page.page.unroute("**/lens/memory?*")


@one_renderer
def test_nothing_is_asked_while_a_picture_is_drawn(page: LensPage):
    asked: list[str] = []
    page.page.on("request", lambda request: "/lens/memory" in request.url and asked.append(request.url))
    page.load(WORKFLOW)
    page.use_tiny_models()
    wait_for(page, "LensSampler", "For 1 x 256x256")
    page.page.wait_for_timeout(600)
    asked.clear()
    page.page.evaluate("() => app.api.dispatchCustomEvent('status', {exec_info: {queue_remaining: 1}})")
    page.set_widgets("LensEmptyLatent", batch_size=2)
    page.page.wait_for_timeout(600)
    assert asked == []
    page.page.evaluate("() => app.api.dispatchCustomEvent('status', {exec_info: {queue_remaining: 0}})")
    wait_for(page, "LensSampler", "For 2 x 256x256")
    assert len(asked) == 2, "one question for each badge"


def test_nodes_tell_what_they_do(page: LensPage):
    page.load(WORKFLOW)
    page.use_tiny_models()
    run = page.run()
    assert run.status == "success", run.error
    assert any(line.startswith("Step 1/") for line in run.texts)
    last = re.compile(r"256x256, \d+ steps?, \d+\.\d s")
    assert any(last.fullmatch(line) for line in run.texts), run.texts
    shown = page.page.evaluate(
        """() => app.rootGraph.nodes.find((node) => node.type === "LensSampler").widgets
                 .find((widget) => widget.name === "$$node-text-preview").value"""
    )
    assert last.fullmatch(shown)
