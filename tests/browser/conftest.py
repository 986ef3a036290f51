"""A real ComfyUI server and a real browser for all tests of this folder: they start once, and so does a page
for each renderer.

They run in a process of their own (see scripts/test): Playwright keeps an event loop running for as long as
its browser lives, and other tests start theirs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, sync_playwright

from scripts.comfy_server import ComfyServer
from tests.browser.lens_page import LensPage

RENDERERS = {"classic": False, "nodes2": True}
# What greets a first-time user would cover the page.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Release.Version": "0.30.0",
    "Comfy.Release.Status": "skip",
    "Comfy.Release.Timestamp": 9999999999999,
    "Comfy.Locale": "en",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # words in pictures of the whole graph
}
CHROMIUM_FLAGS = [
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    # The page may talk to its server alone, so that runs are offline and repeatable.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def pytest_configure() -> None:
    """When it is ended, as by ``timeout``, the server and the browser end too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's base folder, with the settings above and example.png in its input folder."""
    base = tmp_path_factory.mktemp("browser") / "comfy"
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS))
    (base / "input").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(pixels).save(base / "input" / "example.png")
    return base


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """A copy of the tiny models, which tests may add files to."""
    return shutil.copytree(tiny_models, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def host(base: Path, models: Path) -> Iterator[ComfyServer]:
    """A running server with the pack and the tiny models."""
    with ComfyServer(base, models) as running:
        yield running


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """The system's Chromium with a fresh profile."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail(
            "The browser tests need Chromium: apt-get install chromium. LENS_BROWSER=0 leaves them out."
        )
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=path,
            args=CHROMIUM_FLAGS,
            viewport={"width": 1600, "height": 950},
            locale="en-US",
        )
        context.set_default_timeout(45_000)
        yield context
        context.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for pictures of the page."""
    given = os.environ.get("LENS_SCREENSHOTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session", params=RENDERERS)
def opened_page(
    request: pytest.FixtureRequest, host: ComfyServer, chromium: BrowserContext, screenshots: Path
) -> Iterator[LensPage]:
    """The page in one renderer, opened once; see ``page``."""
    host.post("/api/settings", {"Comfy.VueNodes.Enabled": RENDERERS[request.param]})
    page = LensPage(chromium.new_page(), host, request.param, screenshots)
    page.open()
    yield page
    page.close()


@pytest.fixture
def page(opened_page: LensPage, request: pytest.FixtureRequest) -> Iterator[LensPage]:
    """The page with an empty graph, in both renderers: a test runs twice, unless ``one_renderer`` marks it.

    Fails if ours logged an error meanwhile; takes a picture of the page at the end, failed or not."""
    opened_page.start_anew()
    yield opened_page
    opened_page.screenshot(request.node.name)
    assert opened_page.errors_of_ours() == []
