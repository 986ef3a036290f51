"""Every example workflow opens in the page and is drawn from there, in both renderers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.comfy_server import PACK
from scripts.demo_run import NANO_WORKFLOW
from tests.browser.lens_page import LensPage

TEMPLATES = sorted((PACK / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_opens_and_draws(page: LensPage, path: Path):
    page.load(path)
    assert page.missing_nodes() == []
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert set(page.node_types()) >= {node["type"] for node in saved["nodes"]}

    if path != NANO_WORKFLOW:  # whose models come with the pack
        page.use_tiny_models()
    run = page.run()
    assert run.status == "success", run.error
    (picture,) = page.pictures(run)
    with Image.open(picture) as image:
        assert np.asarray(image).std() > 5, "a flat picture"
