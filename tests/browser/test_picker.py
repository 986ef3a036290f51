"""The aspect picker of LensEmptyLatent, in both renderers."""

from __future__ import annotations

import pytest

from lens_core.sampling import ASPECT_RATIOS, BUCKETS
from tests.browser.lens_page import LensPage

TYPE = "LensEmptyLatent"


def add(page: LensPage) -> None:
    page.page.evaluate(
        """(type) => { const node = LiteGraph.createNode(type); node.pos = [200, 200];
             app.rootGraph.add(node);
             app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState(); }""",
        TYPE,
    )
    page.fit()
    page.page.locator(".lens-aspect").wait_for()
    page.fit()  # the node has grown by its picker


def chosen(page: LensPage) -> list[str]:
    return page.page.locator(".lens-aspect [aria-checked=true] b").all_inner_texts()


def test_every_shape_is_drawn_to_scale_with_its_size(page: LensPage) -> None:
    add(page)
    page.set_widgets(TYPE, base_resolution="1440")
    shown = page.page.evaluate(
        """() => [...document.querySelectorAll(".lens-aspect button")].map((button) => {
             const {width, height} = button.querySelector("i").style;
             return [button.querySelector("b").textContent, button.querySelector("small").textContent,
                     parseFloat(width) / parseFloat(height)] })"""
    )
    assert [ratio for ratio, *_ in shown] == list(ASPECT_RATIOS)
    for ratio, size, shape in shown:
        height, width = BUCKETS[1440][ratio]
        assert size == f"{width}\N{MULTIPLICATION SIGN}{height}"
        assert shape == pytest.approx(width / height, rel=1e-4)  # CSS keeps six digits


def test_a_click_sets_the_combo_and_undo_the_picker(page: LensPage) -> None:
    add(page)
    page.page.get_by_role("radio", name="16:9, 1376 \N{MULTIPLICATION SIGN} 768 pixels").click()
    assert (page.widget(TYPE, "aspect_ratio"), chosen(page)) == ("16:9", ["16:9"])
    page.command("Comfy.Undo")
    page.page.locator(".lens-aspect [aria-checked=true]", has_text="1:1").wait_for()
    assert (page.widget(TYPE, "aspect_ratio"), chosen(page)) == ("1:1", ["1:1"])


def test_the_arrow_keys_choose_and_move_the_focus(page: LensPage) -> None:
    add(page)
    page.page.locator(".lens-aspect [tabindex='0']").focus()
    for key, ratio in (("ArrowRight", "4:3"), ("ArrowUp", "1:1"), ("End", "2:1"), ("ArrowRight", "1:2")):
        page.page.keyboard.press(key)
        focused = page.page.evaluate("() => document.activeElement.querySelector('b')?.textContent")
        assert (page.widget(TYPE, "aspect_ratio"), chosen(page), focused) == (ratio, [ratio], ratio)
    page.page.keyboard.press("Control+z")
    page.page.wait_for_function("() => app.rootGraph.nodes[0].widgets[1].value === '2:1'")


def test_it_follows_the_combo_and_a_file_and_is_in_neither_file_nor_prompt(page: LensPage) -> None:
    add(page)
    page.set_widgets(TYPE, aspect_ratio="2:3")
    assert chosen(page) == ["2:3"]
    saved = page.graph()
    assert saved["nodes"][0]["widgets_values"] == ["1024", "2:3", 1]
    inputs = page.page.evaluate("async () => Object.values((await app.graphToPrompt()).output)[0].inputs")
    assert inputs == {"base_resolution": "1024", "aspect_ratio": "2:3", "batch_size": 1}
    page.set_widgets(TYPE, aspect_ratio="1:1")
    page.load(saved)
    page.page.locator(".lens-aspect").wait_for()
    assert chosen(page) == ["2:3"]


def test_a_wired_ratio_is_nobodys_to_choose(page: LensPage) -> None:
    add(page)
    page.page.evaluate(
        """() => { const text = LiteGraph.createNode("PrimitiveString"); app.rootGraph.add(text);
             const node = app.rootGraph.nodes[0];
             node.inputs.find((input) => input.name === "aspect_ratio").type = "*";
             text.connect(0, node, "aspect_ratio"); }"""
    )
    assert chosen(page) == []
    assert page.page.locator(".lens-aspect button:disabled").count() == len(ASPECT_RATIOS)
    page.page.evaluate("() => app.rootGraph.nodes[0].disconnectInput('aspect_ratio')")
    assert chosen(page) == ["1:1"]


def test_the_wheel_zooms_over_it_as_elsewhere(page: LensPage) -> None:
    add(page)
    page.page.locator(".lens-aspect").hover()
    scale = page.page.evaluate("() => app.canvas.ds.scale")
    page.page.mouse.wheel(0, 200)
    page.page.wait_for_function("(scale) => app.canvas.ds.scale < scale", arg=scale)
