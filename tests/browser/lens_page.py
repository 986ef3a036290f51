"""ComfyUI's page in a browser, driven as a user drives it."""

from __future__ import annotations

import base64
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import ConsoleMessage, Error, Locator, Page, TimeoutError

from scripts.comfy_server import ComfyServer
from scripts.demo_run import TINY

# Opening a page takes five seconds: what a renderer cannot change is tested in one.
one_renderer = pytest.mark.parametrize("opened_page", ["classic"], indirect=True, scope="session")

READY = """() => window.app?.extensionManager?.workflow?.activeWorkflow && app.rootGraph
  && document.querySelector("canvas#graph-canvas") && !document.querySelector("#splash-loader")"""

STATE = """() => ({visible: document.visibilityState, extensions: !!window.app?.extensionManager,
  workflow: !!window.app?.extensionManager?.workflow?.activeWorkflow, graph: !!window.app?.rootGraph,
  splash: !!document.querySelector("#splash-loader"), text: document.body.innerText.slice(0, 500)})"""

# Milliseconds; five seconds are usual, and nobody knows what else the machine does.
OPENING = 60_000

# All nodes, those inside subgraphs too.
EVERY_NODE = """const everyNode = (graph) =>
  graph.nodes.flatMap((node) => [node, ...(node.subgraph ? everyNode(node.subgraph) : [])]);"""


@dataclass
class Run:
    """How a queued workflow ended: ``status`` is success, error, interrupted or rejected."""

    status: str
    error: dict[str, Any] | None = None
    outputs: dict[str, Any] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


class LensPage:
    """One tab, with one renderer of nodes. ``page`` is Playwright's, for what is missing here."""

    def __init__(self, page: Page, host: ComfyServer, renderer: str, screenshots: Path) -> None:
        self.page, self.host, self.renderer, self.screenshots = page, host, renderer, screenshots
        self._errors: list[str] = []
        page.on("console", self._logged)
        page.on("pageerror", self._raised)

    def open(self) -> None:
        """Open the page, or open it again, and wait until it can be used.

        Now and then one on a busy machine never comes: a warning says what it has, and it is opened again."""
        try:
            self._open()
        except TimeoutError as error:
            self.screenshot(f"not open-{self.renderer}")
            warnings.warn(f"The page did not open: {error}\n{self.page.evaluate(STATE)}", stacklevel=2)
            self._open()

    def _open(self) -> None:
        self.page.goto(self.host.url, wait_until="domcontentloaded", timeout=OPENING)
        # At intervals: a tab that is not shown draws no frames, at each of which Playwright would look.
        self.page.bring_to_front()
        self.page.wait_for_function(READY, timeout=OPENING, polling=200)

    def close(self) -> None:
        self.page.close()

    def start_anew(self) -> None:
        """One tab with an empty graph, no toasts, no dialogs, no selection and no errors noted."""
        self.page.keyboard.press("Escape")
        self.page.evaluate(
            """async () => {
                 const {toast, workflow} = app.extensionManager;
                 toast.removeAll();
                 await app.extensionManager.setting.set("Comfy.RightSidePanel.IsOpen", false);
                 await app.loadGraphData({nodes: [], links: [], version: 0.4});
                 for (const other of [...workflow.openWorkflows])
                   if (other.path !== workflow.activeWorkflow.path) await workflow.closeWorkflow(other);
               }"""
        )
        self.page.locator(".p-toast-message").first.wait_for(state="detached")  # they fade
        self._errors.clear()

    # Workflows

    def load(self, workflow: Path | dict[str, Any]) -> None:
        """Load a workflow as a template is loaded, and show all of it."""
        if isinstance(workflow, Path):
            workflow = json.loads(workflow.read_text(encoding="utf-8"))
        self.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        self.fit()

    def drop(self, path: Path) -> None:
        """Drop a file onto the canvas: a PNG with a workflow, or a workflow's file."""
        content = base64.b64encode(path.read_bytes()).decode()
        kind = {".png": "image/png", ".json": "application/json"}[path.suffix]
        self.page.evaluate(
            """([content, name, type]) => {
                 const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
                 const dataTransfer = new DataTransfer();
                 dataTransfer.items.add(new File([bytes], name, {type}));
                 const where = {clientX: 800, clientY: 500, bubbles: true, cancelable: true};
                 document.getElementById("graph-canvas")
                   .dispatchEvent(new DragEvent("drop", {dataTransfer, ...where}));
               }""",
            [content, path.name, kind],
        )

    def graph(self) -> dict[str, Any]:
        """The graph as the page would save it."""
        return self.page.evaluate("() => app.rootGraph.serialize()")

    def node_types(self) -> list[str]:
        """Types of all nodes, sorted, with those in subgraphs."""
        return sorted(
            self.page.evaluate(f"() => {{ {EVERY_NODE} return everyNode(app.rootGraph).map((n) => n.type) }}")
        )

    def missing_nodes(self) -> list[str]:
        """Types that the page does not know."""
        return self.page.evaluate(
            f"""() => {{ {EVERY_NODE}
              return everyNode(app.rootGraph).filter((node) => !node.subgraph && node.has_errors !== undefined
                && !LiteGraph.registered_node_types[node.type]).map((node) => node.type) }}"""
        )

    def set_widgets(self, node_type: str, /, **values: Any) -> None:
        """Set widgets of every node of a type, as a user's choice does; what is not there is left alone."""
        self.page.evaluate(
            f"""([type, values]) => {{ {EVERY_NODE}
              for (const node of everyNode(app.rootGraph).filter((node) => node.type === type))
                for (const widget of node.widgets ?? []) {{
                  if (!(widget.name in values)) continue;
                  const before = widget.value;
                  widget.value = values[widget.name];
                  widget.callback?.(widget.value, app.canvas, node);
                  node.onWidgetChanged?.(widget.name, widget.value, before, widget);
                }}
              app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState() }}""",
            [node_type, values],
        )

    def set_promoted(self, **values: Any) -> None:
        """Set widgets that the subgraph nodes of the root graph show, which hide those inside."""
        self.page.evaluate(
            """(values) => {
                 for (const node of app.rootGraph.nodes.filter((node) => node.subgraph))
                   for (const widget of node.widgets)
                     if (widget.name in values) widget.value = values[widget.name];
               }""",
            values,
        )

    def widget(self, node_type: str, name: str) -> Any:
        """A widget's value on the first node of a type."""
        return self.page.evaluate(
            f"""([type, name]) => {{ {EVERY_NODE}
              return everyNode(app.rootGraph).find((node) => node.type === type)
                .widgets.find((widget) => widget.name === name).value }}""",
            [node_type, name],
        )

    def use_tiny_models(self) -> None:
        """Choose the tiny models and a small picture."""
        for node_type, values in TINY.items():
            self.set_widgets(node_type, **values)
        self.set_widgets("LensReasoner", max_new_tokens=16, effort="none")
        self.set_widgets("LensGrid", base_resolution="256", aspect_ratio="2:1", seeds="1", steps=1)
        self.set_widgets("LensEmptyLatent", base_resolution="256")
        self.set_widgets("LensImageToLatent", base_resolution="256")

    def run(self, seconds: float = 120) -> Run:
        """Queue the graph as the Run button does, and wait for its end."""
        self.page.evaluate(
            """() => {
                 window.lensTestRun?.stop.abort();
                 const run = window.lensTestRun =
                   {status: null, error: null, outputs: {}, texts: [], stop: new AbortController()};
                 const on = (name, react) => app.api.addEventListener(
                   name, (event) => react(event.detail), {signal: run.stop.signal});
                 on("execution_success", () => { run.status = "success"; });
                 on("execution_interrupted", () => { run.status = "interrupted"; });
                 on("execution_error", (detail) => { run.status = "error"; run.error = detail; });
                 on("executed", ({node, output}) => { run.outputs[node] = output; });
                 on("progress_text", ({text}) => { run.texts.push(text); });
               }"""
        )
        if not self.page.evaluate("() => app.queuePrompt(0, 1)"):
            return Run("rejected", self.page.evaluate("() => app.lastNodeErrors"))
        self.page.wait_for_function("() => lensTestRun.status", timeout=seconds * 1000)
        return Run(**self.page.evaluate("() => { const {stop, ...run} = lensTestRun; return run; }"))

    def pictures(self, run: Run) -> list[Path]:
        """Paths of the pictures that a run saved."""
        return self.host.images({"outputs": run.outputs})

    # The page

    def command(self, name: str, wait: bool = True) -> None:
        """Run one of the page's commands, such as Comfy.Undo; do not wait for one that asks the user."""
        result = self.page.evaluate_handle(
            "(name) => ({done: app.extensionManager.command.execute(name)})", name
        )
        if wait:
            result.evaluate("({done}) => done")

    def fit(self) -> None:
        """Show the whole graph. The page's own command glides there, for as long as the machine is busy."""
        self.page.evaluate(
            """() => {
                 const {canvas} = app, boxes = canvas.graph.nodes.map((node) => node.getBounding());
                 const left = Math.min(...boxes.map(([x]) => x));
                 const top = Math.min(...boxes.map(([, y]) => y));
                 const right = Math.max(...boxes.map(([x, , width]) => x + width));
                 const bottom = Math.max(...boxes.map(([, y, , height]) => y + height));
                 canvas.deselectAll();
                 canvas.ds.fitToBounds([left, top, right - left, bottom - top], {zoom: 0.85});
                 canvas.setDirty(true, true);
                 return new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)));
               }"""
        )

    def click_node(self, node_type: str) -> None:
        """Select the first node of a type by a click on its title."""
        node, x, y = self.page.evaluate(
            """(type) => {
                 const {canvas} = app, {scale, offset} = canvas.ds;
                 const {id, pos, size} = canvas.graph.nodes.find((node) => node.type === type);
                 const corner = canvas.canvas.getBoundingClientRect();
                 return [id, corner.left + (pos[0] + size[0] / 2 + offset[0]) * scale,
                         corner.top + (pos[1] - 15 + offset[1]) * scale];
               }""",
            node_type,
        )
        if self.renderer == "nodes2":
            self.page.get_by_test_id(f"node-header-{node}").click()
        else:
            self.page.mouse.click(x, y)

    def node(self, node_type: str) -> Locator:
        """The element of the first node of a type; only nodes2 has any."""
        number = self.page.evaluate(
            "(type) => app.canvas.graph.nodes.find((node) => node.type === type).id", node_type
        )
        return self.page.locator(f"[data-node-id='{number}']")

    def open_help(self, node_type: str) -> None:
        """Open a node's help page as a user does: select it, then press the toolbox's ⓘ."""
        self.click_node(node_type)
        self.page.get_by_test_id("info-button").first.click()

    def help_page(self) -> Locator:
        """What ``open_help`` opened; not what the page makes of the schema where there is no help page."""
        return self.page.locator(".node-help-content .markdown-content")

    def toasts(self) -> list[str]:
        """Texts of the toasts that are to be seen."""
        return self.page.locator(".p-toast-message").all_inner_texts()

    def setting(self, name: str) -> Any:
        return self.page.evaluate("(name) => app.extensionManager.setting.get(name)", name)

    def set_setting(self, name: str, value: Any) -> None:
        self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])

    def screenshot(self, name: str) -> Path:
        """Take a picture of the page; returns its path."""
        path = self.screenshots / (re.sub(r"[^\w.-]+", "-", name).strip("-") + ".png")
        try:
            self.page.screenshot(path=path)
        except Error as error:
            # A page too busy to be drawn must not hide what a test found.
            print(f"no screenshot: {error}")
        return path

    # What goes wrong in it

    def errors_of_ours(self) -> list[str]:
        """Errors that the console got from our scripts, files or routes, and extensions that did not load."""
        return list(self._errors)

    def _logged(self, message: ConsoleMessage) -> None:
        where = message.location.get("url", "")
        if message.type == "error" and (self._is_ours(where, message.text)):
            self._errors.append(f"{message.text} ({where})")

    def _raised(self, error: Error) -> None:
        if self._is_ours("", error.stack or error.message):
            self._errors.append(error.stack or error.message)

    def _is_ours(self, where: str, text: str) -> bool:
        if re.search(r"/docs/\w+/\w+\.md$", where):  # the page looks for a help page in its language first
            return False
        if re.search(r"Error (loading|in) extension", text):
            return True
        return any(f"/{name}/" in part for name in (self.host.folder, "lens") for part in (where, text))
