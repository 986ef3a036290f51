"""A workflow survives what users do to it: saving, reloading, dragging its picture in, renaming the pack."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext

from scripts.comfy_server import PACK, ComfyServer
from tests.browser.lens_page import LensPage, one_renderer

TURBO = PACK / "example_workflows" / "Lens Turbo - 4 steps.json"


def content(graph: dict[str, Any]) -> tuple[dict, list]:
    """What must stay: each node's type, widgets and the pack's name, and what is linked to what."""
    nodes = {
        node["id"]: (node["type"], node.get("widgets_values"), node["properties"].get("cnr_id"))
        for node in graph["nodes"]
    }
    return nodes, sorted(link[1:5] for link in graph["links"])


@pytest.fixture
def drawn(page: LensPage) -> tuple[Path, dict[str, Any]]:
    """The Turbo template's picture from the tiny models, and the graph that drew it."""
    page.load(TURBO)
    page.use_tiny_models()
    page.set_widgets("LensSampler", control_after_generate="fixed")
    run = page.run()
    assert run.status == "success", run.error
    (picture,) = page.pictures(run)
    return picture, page.graph()


def test_saved_and_opened_again(page: LensPage, drawn: tuple[Path, dict[str, Any]]):
    _, graph = drawn
    name = f"kept-{page.renderer}"
    page.command("Comfy.SaveWorkflowAs", wait=False)
    dialog = page.page.get_by_role("dialog")
    dialog.get_by_role("textbox").fill(name)
    dialog.get_by_role("textbox").press("Enter")
    dialog.wait_for(state="detached")
    saved = page.host.base / "user" / "default" / "workflows" / f"{name}.json"
    page.page.wait_for_function("() => !app.extensionManager.workflow.activeWorkflow.isModified")
    assert saved.is_file()

    page.open()
    page.page.wait_for_function("() => app.rootGraph.nodes.length")
    assert page.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.filename") == name
    assert page.missing_nodes() == []
    assert content(page.graph()) == content(graph)


def test_its_picture_dragged_in(page: LensPage, drawn: tuple[Path, dict[str, Any]]):
    picture, graph = drawn
    page.start_anew()
    page.drop(picture)
    page.page.wait_for_function("() => app.rootGraph.nodes.length")
    assert content(page.graph()) == content(graph)
    page.set_widgets("LensSampler", seed=8)
    assert page.run().status == "success"


@pytest.fixture
def renamed(base: Path, models: Path, tmp_path: Path) -> Iterator[ComfyServer]:
    """A server that has the pack in the folder that the registry makes. A version behind an @ would do, but
    for the help pages: ComfyUI's page looks for them without it."""
    shutil.copytree(base / "user", tmp_path / "user")
    with ComfyServer(tmp_path, models, folder="lenspack") as running:
        yield running


@one_renderer
def test_the_packs_folder_renamed(
    page: LensPage,
    drawn: tuple[Path, dict[str, Any]],
    renamed: ComfyServer,
    chromium: BrowserContext,
    screenshots: Path,
):
    picture, graph = drawn
    assert list(renamed.get("/api/workflow_templates")) == ["lenspack"]
    other = LensPage(chromium.new_page(), renamed, page.renderer, screenshots)
    with contextlib.closing(other):
        other.open()
        other.start_anew()
        other.drop(picture)
        other.page.wait_for_function("() => app.rootGraph.nodes.length")
        assert other.missing_nodes() == []
        assert content(other.graph()) == content(graph)
        assert other.run().status == "success"
        other.fit()
        try:
            other.open_help("LensSampler")
            other.help_page().locator("table").first.wait_for()
        finally:
            other.screenshot("renamed")
        assert other.errors_of_ours() == []
