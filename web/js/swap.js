/** The command "Lens: use this pack's nodes": ComfyUI's own Lens nodes in the graph become this pack's. */

import { app } from "../../../scripts/app.js";
import { withOwnNodes } from "./own_nodes.js";

const COMMAND = "Lens.UseOwnNodes";
const TITLE = "Lens: use this pack's nodes";

/** Whether a loader of ours offers the file: it looked into its header. A missing one is known by its name. */
function offeredBy(nodeType, input, published) {
  const { required } = LiteGraph.registered_node_types[nodeType].nodeData.input;
  const [kind, options] = required[input];
  const names = Array.isArray(kind) ? kind : options.options;
  return (name) => names.includes(name) || published.test(name ?? "");
}

async function useOwnNodes() {
  const { swapped, workflow } = withOwnNodes(
    app.rootGraph.serialize(),
    offeredBy("LensModelLoader", "model_name", /(^|[\\/])lens[_-]/i),
    offeredBy("LensVAELoader", "vae_name", /(^|[\\/])flux2-vae/i),
  );
  if (swapped) await replaceGraph(workflow);
  app.extensionManager.toast.add({
    severity: swapped ? "success" : "info",
    summary: TITLE,
    detail: swapped
      ? `${swapped} nodes are this pack's now. Ctrl+Z brings the others back.`
      : "No nodes of ComfyUI's own Lens are in this graph.",
    life: 6000,
  });
}

/** Load a graph in the open workflow's place, as one change that can be undone. */
async function replaceGraph(graph) {
  const open = app.extensionManager.workflow.activeWorkflow;
  const tracker = open.changeTracker;
  const saved = tracker.initialState;
  tracker.captureCanvasState?.();
  const before = tracker.activeState;
  await app.loadGraphData(graph, true, false, open);
  // Loading takes the new graph for what is on disk.
  tracker.initialState = saved;
  tracker.undoQueue.push(before);
  tracker.redoQueue.length = 0;
  tracker.updateModified();
}

app.registerExtension({
  name: "lens.swap",
  commands: [{ id: COMMAND, label: TITLE, icon: "pi pi-sync", function: useOwnNodes }],
  menuCommands: [{ path: ["Extensions", "Lens"], commands: [COMMAND] }],
});
