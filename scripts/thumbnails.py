"""Writes the thumbnails of the templates: each example workflow as ComfyUI's page shows it, without its note.

    source scripts/env; "$PYTHON" -m scripts.thumbnails ["Lens - inpaint" ...]

Needs Chromium (apt-get install chromium). The tiny models stand in for the published ones, so that the page
marks nothing as missing; nothing is drawn by them.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lens_core.tiny.layouts import write_everything
from scripts.comfy_server import PACK, ComfyServer
from scripts.demo_run import TINY
from scripts.workflow import NOTES

if TYPE_CHECKING:
    from playwright.sync_api import Page

FOLDER = PACK / "example_workflows"
# The browser's window and the thumbnail, in pixels; the templates' list shows squares.
_WINDOW = {"width": 1100, "height": 1100}
_SIZE = (400, 400)
_MARGIN = 30
_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Locale": "en",
    "Comfy.Minimap.Visible": False,
    "Comfy.VueNodes.Enabled": True,
    "Comfy.ColorPalette": "light",  # in the list, which is dark, a dark graph is hardly seen
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
}
# Fills the window with the graph; returns where it is, in pixels of the window.
_SHOW = """([workflow, margin]) => app.loadGraphData(workflow).then(() => {
  const {canvas} = app, {width, height} = canvas.canvas.getBoundingClientRect();
  const boxes = app.rootGraph.nodes.map((node) => node.boundingRect);
  const left = Math.min(...boxes.map((box) => box[0])), top = Math.min(...boxes.map((box) => box[1]));
  const wide = Math.max(...boxes.map((box) => box[0] + box[2])) - left;
  const high = Math.max(...boxes.map((box) => box[1] + box[3])) - top;
  const scale = Math.min((width - 2 * margin) / wide, (height - 2 * margin) / high);
  canvas.ds.scale = scale;
  canvas.ds.offset = [margin / scale - left, margin / scale - top];
  canvas.setDirty(true, true);
  return {x: 0, y: 0, width: wide * scale + 2 * margin, height: high * scale + 2 * margin};
})"""


def main(names: list[str]) -> None:
    """Write the thumbnails of the named workflows, of all by default; prints their paths and sizes."""
    from playwright.sync_api import sync_playwright

    paths = [FOLDER / f"{name}.json" for name in names] or sorted(FOLDER.glob("*.json"))
    base = Path(tempfile.mkdtemp(prefix="lens-thumbnails-"))
    write_everything(base / "models", seed=0)
    (base / "comfy" / "input").mkdir(parents=True)
    Image.linear_gradient("L").save(base / "comfy" / "input" / "example.png")
    settings = base / "comfy" / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(_SETTINGS))
    with ComfyServer(base / "comfy", base / "models") as server, sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(viewport=_WINDOW)
        page.goto(server.url)
        page.wait_for_function(
            "() => window.app?.extensionManager?.workflow?.activeWorkflow"
            ' && !document.querySelector("#splash-loader")'
        )
        page.evaluate('() => app.extensionManager.command.execute("Workspace.ToggleFocusMode")')
        page.add_style_tag(content=".no-drag { visibility: hidden }")  # the button that ends this mode
        for path in paths:
            write_thumbnail(picture_of(page, path), path.with_suffix(".jpg"))
        browser.close()
    shutil.rmtree(base)


def picture_of(page: Page, path: Path) -> Image.Image:
    """A workflow as the page shows it."""
    place = page.evaluate(_SHOW, [_with_tiny_models(path), _MARGIN])
    page.wait_for_timeout(1500)  # the nodes appear one by one
    return Image.open(io.BytesIO(page.screenshot(clip=place)))


def write_thumbnail(picture: Image.Image, target: Path) -> None:
    """A JPEG with the picture in its middle, on the picture's own background."""
    background = picture.getpixel((2, 2))
    picture.thumbnail(_SIZE, Image.Resampling.LANCZOS)
    square = Image.new("RGB", _SIZE, background[:3])
    square.paste(picture, tuple((whole - part) // 2 for whole, part in zip(_SIZE, picture.size, strict=True)))
    square.save(target, quality=88, optimize=True)
    print(f"{target}  {target.stat().st_size:,} bytes")


def _with_tiny_models(path: Path) -> dict[str, Any]:
    """The workflow without its note, and with files that are there; nano Lens' are."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    workflow["nodes"] = [node for node in workflow["nodes"] if node["type"] not in NOTES]
    for node in workflow["nodes"]:
        values, models = node.get("widgets_values"), node["properties"].pop("models", ())
        if node["type"] in TINY and values[0] != "nano/lens":
            published = [model["name"] for model in models] or values[:1]
            for name, tiny in zip(published, TINY[node["type"]].values(), strict=True):
                values[values.index(name)] = tiny
    return workflow


if __name__ == "__main__":
    main(sys.argv[1:])
