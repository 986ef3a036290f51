"""The settings: what new nodes begin with, and the feature cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.lens_page import LensPage, one_renderer

TURBO = "lens_turbo_tiny_bf16.safetensors"
CHOSEN = {
    "Lens.DefaultCheckpoint": TURBO,
    "Lens.DefaultQuantization": "int8_dynamic",
    "Lens.DatePolicy": "today",
    "Lens.ReasonerEndpoint": "http://127.0.0.1:9/v1",
}
ADD = """() => { for (const type of ["LensModelLoader", "LensTextEncode", "LensReasonerAPI"])
  app.rootGraph.add(LiteGraph.createNode(type)) }"""
VALUES = {
    ("LensModelLoader", "model_name"): TURBO,
    ("LensModelLoader", "quantization"): "int8_dynamic",
    ("LensTextEncode", "template_date"): "today",
    ("LensReasonerAPI", "api_url"): "http://127.0.0.1:9/v1",
}


def values(page: LensPage) -> dict[tuple[str, str], str]:
    return {where: page.widget(*where) for where in VALUES}


def forget(page: LensPage) -> None:
    for name in CHOSEN:
        page.set_setting(name, "" if name == "Lens.ReasonerEndpoint" else "default")


@pytest.fixture
def chosen(page: LensPage) -> Iterator[LensPage]:
    for name, value in CHOSEN.items():
        page.set_setting(name, value)
    yield page
    forget(page)


@one_renderer
def test_new_nodes_begin_with_them_and_files_do_not(page: LensPage, chosen: LensPage) -> None:
    page.page.evaluate(ADD)
    assert values(page) == VALUES
    forget(page)
    page.start_anew()
    page.page.evaluate(ADD)
    usual, saved = values(page), page.graph()
    assert not set(usual.items()) & set(VALUES.items())
    # Written before the node had all of its inputs.
    for node in saved["nodes"]:
        node["widgets_values"] = node["widgets_values"][:1]
    for name, value in CHOSEN.items():
        page.set_setting(name, value)
    page.load(saved)
    assert values(page) == usual
    prompt = {"1": {"class_type": "LensModelLoader", "inputs": {}}}
    page.page.evaluate("(prompt) => app.loadApiJson(prompt, 'prompt')", prompt)
    assert page.widget("LensModelLoader", "quantization") == "none"


@one_renderer
def test_a_choice_that_is_gone_is_not_taken(page: LensPage, chosen: LensPage) -> None:
    page.set_setting("Lens.DefaultCheckpoint", "gone.safetensors")
    page.page.evaluate(ADD)
    assert page.widget("LensModelLoader", "model_name") != "gone.safetensors"


@one_renderer
def test_the_settings_page_has_them_and_clears_the_cache(page: LensPage) -> None:
    page.command("Comfy.ShowSettingsDialog")
    page.page.get_by_role("button", name="Lens", exact=True).click()
    page.page.get_by_text("A chosen checkpoint sets steps and cfg").wait_for()
    page.screenshot("settings")
    clear = page.page.get_by_role("button", name="Clear", exact=True)
    clear.click()
    page.page.get_by_role("button", name="Delete all features?").press("Tab")
    clear.click()
    freed = page.page.locator(".p-toast-message", has_text="MB freed")
    assert freed.count() == 0
    page.page.get_by_role("button", name="Delete all features?").click()
    freed.wait_for()
    page.page.keyboard.press("Escape")


@one_renderer
def test_the_command_asks_before_it_clears_the_cache(page: LensPage) -> None:
    page.command("Lens.ClearFeatureCache", wait=False)
    confirm = page.page.get_by_role("button", name="Confirm")
    freed = page.page.locator(".p-toast-message", has_text="MB freed")
    confirm.wait_for()
    assert freed.count() == 0
    confirm.click()
    freed.wait_for()
