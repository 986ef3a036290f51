"""The blueprint "Lens - text to image": in the node library, dropped into a graph, drawn."""

from __future__ import annotations

from scripts.demo_run import TINY
from tests.browser.lens_page import LensPage

TITLE = "Lens - text to image"
PROMOTED = {
    "prompt", "negative", "aspect_ratio", "base_resolution", "seed",
    "model_name", "quantization", "encoder_name", "vae_name",
}  # fmt: skip


def test_it_is_dropped_from_the_node_library_and_draws(page: LensPage):
    page.command("Workspace.ToggleSidebarTab.node-library")
    search = page.page.get_by_placeholder("Search").first
    search.fill("lens - text")
    found = page.page.get_by_text(TITLE, exact=True).first
    found.wait_for()
    page.screenshot("blueprint in the library")
    found.click()
    page.page.mouse.click(900, 400)
    page.page.wait_for_timeout(1000)
    page.screenshot("blueprint dropped")
    (widgets,) = page.page.evaluate("() => app.rootGraph.nodes.map((n) => n.widgets.map((w) => w.name))")
    assert set(widgets) >= PROMOTED
    for values in TINY.values():
        page.set_promoted(**values)
    page.set_promoted(prompt="a circle", aspect_ratio="1:1", base_resolution="256")
    page.page.evaluate(
        """() => { const [node] = app.rootGraph.nodes, save = LiteGraph.createNode("SaveImage");
          app.rootGraph.add(save); save.pos = [node.pos[0] + 500, node.pos[1]]; node.connect(0, save, 0); }"""
    )
    run = page.run()
    assert run.status == "success", run.error
    page.screenshot("blueprint drawn")
