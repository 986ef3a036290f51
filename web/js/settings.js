/**
 * The pack's settings, which ComfyUI keeps with its own: what new nodes begin with, and the feature cache.
 */
import { app } from "../../../scripts/app.js";
import { ask, choicesOf, makeButton, setting, toast, widgetOf } from "./host.js";

/** The inputs that a new node takes from a setting, by node type. */
const DEFAULTS = {
  LensModelLoader: { model_name: "Lens.DefaultCheckpoint", quantization: "Lens.DefaultQuantization" },
  LensTextEncode: { template_date: "Lens.DatePolicy" },
  LensReasonerAPI: { api_url: "Lens.ReasonerEndpoint" },
};
const CLEAR = "Lens.ClearFeatureCache";
const POST = { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" };
// Not "", which ComfyUI's combos show as nothing.
const AS_IT_IS = { text: "as in the node", value: "default" };

/** A combo of a node input's choices, read when the settings are opened. */
function fromNode(type, input) {
  return {
    type: "combo",
    defaultValue: AS_IT_IS.value,
    attrs: { style: "width: 18rem" }, // names of files are long
    options: () => [AS_IT_IS, ...choicesOf(type, input).map((choice) => ({ text: choice, value: choice }))],
  };
}

async function clearFeatureCache() {
  try {
    const { freed } = await ask("/lens/feature_cache/clear", POST);
    toast("success", "Lens", `Feature cache: ${(freed / 1e6).toFixed(1)} MB freed.`);
  } catch (error) {
    toast("error", "Lens", `The feature cache could not be cleared: ${error.message}`);
  }
}

async function askAndClear() {
  const message = "Delete the features of all prompts? They are computed anew when a prompt is used again.";
  if (await app.extensionManager.dialog.confirm({ title: "Clear the feature cache", message })) {
    await clearFeatureCache();
  }
}

/** Pressed twice it clears: in ComfyUI 0.27 the page's own question would open behind the settings. */
function clearButton() {
  const [first, second] = ["Clear", "Delete all features?"];
  const button = makeButton(first, () => {
    const sure = button.textContent === second;
    button.textContent = sure ? first : second;
    if (sure) clearFeatureCache();
  });
  button.addEventListener("blur", () => (button.textContent = first));
  return button;
}

/** @type {Object[]} the last is shown first */
const SETTINGS = [
  {
    id: "Lens.ReasonerEndpoint",
    category: ["Lens", "New nodes", "Reasoner's server"],
    name: "Reasoner's server",
    tooltip:
      "api_url of new LensReasonerAPI nodes, such as http://127.0.0.1:8080/v1. The key stays in OPENAI_API_KEY.",
    type: "text",
    defaultValue: "",
  },
  {
    id: "Lens.DatePolicy",
    category: ["Lens", "New nodes", "Date"],
    name: "Date around the prompt",
    tooltip: "template_date of new LensTextEncode nodes.",
    ...fromNode("LensTextEncode", "template_date"),
  },
  {
    id: "Lens.DefaultQuantization",
    category: ["Lens", "New nodes", "Quantization"],
    name: "Quantization",
    tooltip: "quantization of new LensModelLoader nodes.",
    ...fromNode("LensModelLoader", "quantization"),
  },
  {
    id: "Lens.DefaultCheckpoint",
    category: ["Lens", "New nodes", "Checkpoint"],
    name: "Checkpoint",
    tooltip: "model_name of new LensModelLoader nodes.",
    ...fromNode("LensModelLoader", "model_name"),
  },
  {
    id: "Lens.FollowPreset",
    category: ["Lens", "Checkpoints", "Preset"],
    name: "A chosen checkpoint sets steps and cfg",
    tooltip:
      "In the samplers that get their model from the loader, where nothing is connected to steps and cfg.",
    type: "boolean",
    defaultValue: true,
  },
  {
    id: CLEAR,
    category: ["Lens", "Feature cache", "Clear"],
    name: "Clear the feature cache",
    tooltip: "Deletes the text features of all prompts from the disk.",
    type: clearButton,
    defaultValue: null,
  },
  {
    id: "Lens.FeatureCacheGB",
    category: ["Lens", "Feature cache", "Size"],
    name: "Size in GB",
    tooltip: "The features of prompts kept on disk; the oldest leave first.",
    type: "number",
    defaultValue: 1,
    attrs: { min: 0, max: 100, step: 0.5, minFractionDigits: 0, maxFractionDigits: 1 },
  },
];

/** Give a node that the user adds what the settings say; what is no longer there stays as the node has it. */
function giveDefaults(node) {
  for (const [input, id] of Object.entries(DEFAULTS[node.comfyClass] ?? {})) {
    const widget = widgetOf(node, input);
    const value = setting(id);
    const choices = choicesOf(node.comfyClass, input);
    if (widget && value && (!choices.length || choices.includes(value))) widget.value = value;
  }
}

let readingPrompt = false;

app.registerExtension({
  name: "lens.settings",
  settings: SETTINGS,
  commands: [
    { id: CLEAR, label: "Lens: clear the feature cache", icon: "pi pi-trash", function: askAndClear },
  ],
  setup() {
    // A file in API format is read node by node; what it leaves out is the server's default.
    const loadApiJson = app.loadApiJson;
    app.loadApiJson = function (...args) {
      readingPrompt = true;
      try {
        return loadApiJson.apply(this, args);
      } finally {
        readingPrompt = false;
      }
    };
  },
  nodeCreated(node) {
    if (!app.configuringGraph && !readingPrompt) giveDefaults(node);
  },
});
