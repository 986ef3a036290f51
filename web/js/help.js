/**
 * A node's help page: the Info tab that the node's own toolbox opens.
 */
import { app } from "../../../scripts/app.js";
import { definition, toast } from "./host.js";

const INFO = '[data-testid="info-button"]';

/**
 * Select the node, and press its info button; where the toolbox is turned off, say where else it is.
 * @param {Object | undefined} node none if it was deleted since
 * @param {string} type
 */
export async function openHelp(node, type) {
  if (node) {
    await openGraph(node.graph);
    app.canvas.selectItems([node]);
    app.canvas.centerOnNode(node);
    const button = await appearing(INFO);
    if (button) return button.click();
  }
  const name = definition(type)?.display_name ?? type;
  toast("info", name, "Select the node and open the Info tab of the panel on the right.");
}

/** Show the graph or subgraph, as the page's own Locate does. */
async function openGraph(graph) {
  const { canvas } = app;
  if (graph === canvas.graph) return;
  canvas.subgraph = graph.isRootGraph ? undefined : graph;
  canvas.setGraph(graph);
  for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
}

async function appearing(selector, patience = 30) {
  for (let frame = 0; frame < patience; frame++) {
    const found = document.querySelector(selector);
    if (found) return found;
    await new Promise(requestAnimationFrame);
  }
  return null;
}
