/**
 * A node's help page: the Info tab that the node's own toolbox opens.
 */
import { app } from "../../../scripts/app.js";
import { definition, toast } from "./host.js";

const INFO = '[data-testid="info-button"]';

/**
 * Select the node, and press its info button; where the toolbox is turned off, say where the page is.
 * @param {Object | undefined} node none if it was deleted since
 * @param {string} type
 */
export async function openHelp(node, type) {
  if (node) {
    if (node.graph !== app.canvas.graph) app.canvas.setGraph(node.graph);
    app.canvas.selectItems([node]);
    app.canvas.centerOnNode(node);
    const button = await appearing(INFO);
    if (button) return button.click();
  }
  const name = definition(type)?.display_name ?? type;
  toast("info", name, "Its help page is in the node library: right-click the node there, or press ⓘ on a node.");
}

async function appearing(selector, patience = 30) {
  for (let frame = 0; frame < patience; frame++) {
    const found = document.querySelector(selector);
    if (found) return found;
    await new Promise(requestAnimationFrame);
  }
  return null;
}
