"""Pictures of the nodes for their help pages: each node as ComfyUI's page draws it, in ``web/docs/pictures``.

    COMFYUI_PATH=... python -m scripts.help_pictures [NODE_ID ...]

Needs Chromium and the package playwright. All nodes without arguments; to be run again when inputs change.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from lens_core.tiny.layouts import write_everything
from scripts.comfy_server import PACK, ComfyServer

PICTURES = PACK / "web" / "docs" / "pictures"
# The tiny models under the names of the published files, which the pictures show.
MODELS = {
    "diffusion_models/lens_turbo_tiny_bf16.safetensors": "diffusion_models/lens_turbo_bf16.safetensors",
    "text_encoders/gpt_oss_tiny_nvfp4.safetensors": "text_encoders/gpt_oss_20b_nvfp4.safetensors",
    "vae/flux2_tiny_vae.safetensors": "vae/flux2-vae.safetensors",
    "loras/lens_tiny_lora.safetensors": "loras/my_style.safetensors",
}
# What stands in the text fields.
PROMPT = 'A lighthouse on a cliff at dusk, the word "LENS" painted on its wall, 35 mm photograph.'
VALUES = {
    "LensTextEncode": {"prompt": PROMPT},
    "LensReasoner": {"prompt": "a lighthouse at dusk"},
    "LensReasonerAPI": {"prompt": "a lighthouse at dusk", "api_url": "http://127.0.0.1:8080/v1"},
    "LensGrid": {"prompts": "a lighthouse at dusk\na lighthouse at dawn"},
    "LensLoraLoader": {"block_strengths": "0-11: 0.5, 12-47: 1"},
}
# What the server says of the published Turbo on a GPU that has 22 GB free, whatever this machine has.
MEMORY = {"level": "green", "line": "✓ 5.7 GB of 22.0 GB free", "details": []}
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Release.Version": "0.30.0",
    "Comfy.Release.Status": "skip",
    "Comfy.Locale": "en",
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
}
WIDTH, MARGIN = 400, 12
# Two pixels of the screen for each of the page keep the text sharp where the help panel is wide.
SHARPNESS = 2
COLOURS = 128
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
READY = """() => window.app?.extensionManager?.workflow?.activeWorkflow && app.rootGraph
  && !document.querySelector("#splash-loader")"""

# One node alone on an empty canvas; answers the box around it, in the page's pixels.
SHOW = """async ([type, values, width, margin]) => {
  // Not graph.clear(): the page would give the next node, of the same id, this one's values.
  for (const node of [...app.graph.nodes]) app.graph.remove(node);
  const node = LiteGraph.createNode(type);
  app.graph.add(node);
  for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
  node.setSize([Math.max(width, node.computeSize()[0]), node.computeSize()[1]]);
  node.pos = [0, 0];
  const {ds} = app.canvas, title = LiteGraph.NODE_TITLE_HEIGHT;
  ds.scale = 1;
  ds.offset = [500, 150];
  app.canvas.deselectAll();
  for (let frame = 0; frame < 20; frame++) {  // text fields are placed one frame after the node
    app.canvas.setDirty(true, true);
    await new Promise(requestAnimationFrame);
  }
  const corner = app.canvas.canvas.getBoundingClientRect();
  return {
    x: corner.left + 500 - margin,
    y: corner.top + 150 - title - margin,
    width: node.size[0] + 2 * margin,
    height: node.size[1] + title + 2 * margin,
  };
}"""


def take(page: Page, node_id: str) -> Path:
    """Draw one node and write its picture."""
    box = page.evaluate(SHOW, [node_id, VALUES.get(node_id, {}), WIDTH, MARGIN])
    with Image.open(io.BytesIO(page.screenshot(clip=box))) as picture:
        few = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    path = PICTURES / f"{node_id}.png"
    few.save(path, optimize=True)
    return path


def prepare(base: Path) -> Path:
    """The server's settings, and a models folder with a file for each loader; returns the models folder."""
    settings = base / "comfy" / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS))
    write_everything(base / "tiny", seed=0)
    for source, target in MODELS.items():
        path = base / "models" / target
        path.parent.mkdir(parents=True)
        shutil.move(base / "tiny" / source, path)
    return base / "models"


def open_page(browser: Any, server: ComfyServer) -> Page:
    """ComfyUI's page, which may talk to its server alone."""
    view = {"width": 1400, "height": 1100}
    page = browser.new_page(viewport=view, device_scale_factor=SHARPNESS)
    own = (server.url, "blob:", "data:")
    page.route(
        "**/*",
        lambda route: route.continue_() if route.request.url.startswith(own) else route.abort(),
    )
    page.route("**/lens/memory?*", lambda route: route.fulfill(json=MEMORY))
    page.goto(server.url, wait_until="domcontentloaded")
    page.wait_for_function(READY)
    page.wait_for_timeout(1500)  # extensions and their styles
    return page


def main(chosen: list[str]) -> int:
    """Take the pictures; prints each path and its size."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        models = prepare(Path(folder))
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        with ComfyServer(Path(folder) / "comfy", models) as server:
            info = server.get("/object_info")
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            page = open_page(browser, server)
            for node_id in chosen or sorted(name for name in info if name.startswith("Lens")):
                path = take(page, node_id)
                print(f"{path.stat().st_size:>7,}  {path.relative_to(PACK)}")
            browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
