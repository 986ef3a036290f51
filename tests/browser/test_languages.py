"""The page in French shows our nodes' French names, and nothing of a workflow's changes by that."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext

from scripts.comfy_server import PACK, ComfyServer
from tests.browser.conftest import RENDERERS
from tests.browser.lens_page import LensPage
from tests.browser.test_survival import TURBO

WORDS = json.loads((PACK / "locales" / "fr" / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.fixture
def french_page(host: ComfyServer, chromium: BrowserContext, screenshots: Path) -> Iterator[LensPage]:
    """A page opened in French, in the renderer whose nodes are elements that hold their words."""
    host.post("/api/settings", {"Comfy.Locale": "fr", "Comfy.VueNodes.Enabled": RENDERERS["nodes2"]})
    page = LensPage(chromium.new_page(), host, "nodes2", screenshots)
    with contextlib.closing(page):
        page.open()
        page.start_anew()
        yield page
        page.screenshot("french")
    host.post("/api/settings", {"Comfy.Locale": "en"})


def test_a_page_in_french(french_page: LensPage):
    french_page.load(TURBO)
    for kind in ("LensModelLoader", "LensSampler", "LensEmptyLatent"):
        header = french_page.node(kind).get_by_test_id("node-title")
        assert header.inner_text() == WORDS[kind]["display_name"]
    sampler = french_page.node("LensSampler").inner_text()
    for name in ("steps", "denoise"):
        assert WORDS["LensSampler"]["inputs"][name]["name"] in sampler
    types = {node["type"] for node in json.loads(TURBO.read_text(encoding="utf-8"))["nodes"]}
    assert set(french_page.node_types()) == types
    assert french_page.errors_of_ours() == []
