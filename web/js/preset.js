/**
 * Choosing a checkpoint sets the steps and cfg that it was published with, in samplers that get their model
 * from the loader; those that are wired to the loader's outputs follow anyway. Lens.FollowPreset turns it off.
 */
import { app } from "../../../scripts/app.js";
import { after, ask, asOneStep, isOurs, setting, setWidget, toast, widgetOf } from "./host.js";
import { decidingWidget, reachedFrom } from "./follow_model.js";

const SETTINGS = { LensSampler: ["steps", "cfg"], LensScheduler: ["steps"], LensGuider: ["cfg"] };
const WORDS = { steps: (value) => `${value} steps`, cfg: (value) => `cfg ${value}` };

/** @typedef {{variant: string, steps: number, cfg: number}} Preset */

/** @type {Object<string, Preset>} by the loader's choice */
let presets = {};

async function fetchPresets() {
  try {
    presets = await ask("/lens/variants");
  } catch (error) {
    console.warn("Lens: the checkpoints' own steps and cfg are unknown.", error);
  }
}

/**
 * Set what a preset says where nothing is wired.
 * @param {Preset} preset
 * @returns {Map<string, Set<string>>} node titles, by what was set there: "4 steps, cfg 1"
 */
function apply(loader, preset) {
  const done = new Map();
  for (const place of reachedFrom(loader)) {
    const changed = [];
    for (const name of isOurs(place.node.type) ? (SETTINGS[place.node.type] ?? []) : []) {
      const decides = decidingWidget(place, name);
      if (!decides || decides.widget.value === preset[name]) continue;
      setWidget(decides.node, decides.widget, preset[name]);
      changed.push(WORDS[name](preset[name]));
    }
    if (!changed.length) continue;
    const what = changed.join(", ");
    done.set(what, (done.get(what) ?? new Set()).add(place.node.title));
  }
  return done;
}

async function follow(loader, name) {
  if (!setting("Lens.FollowPreset") || app.configuringGraph) return;
  // Known already: the choice and what follows from it are one step of undo.
  if (!(name in presets)) await fetchPresets();
  const preset = presets[name];
  if (!preset || widgetOf(loader, "model_name")?.value !== name) return;
  let done = new Map();
  asOneStep(() => (done = apply(loader, preset)));
  if (!done.size) return;
  const what = [...done].map(([words, titles]) => `${words} set in ${[...titles].join(", ")}`).join("; ");
  toast("info", "Lens", `${preset.variant.replace("Lens-", "")}: ${what}. Ctrl+Z takes it back.`);
}

app.registerExtension({
  name: "lens.preset",
  setup: () => void fetchPresets(),
  refreshComboInNodes: fetchPresets,
  nodeCreated(node) {
    if (node.comfyClass !== "LensModelLoader") return;
    const combo = widgetOf(node, "model_name");
    if (combo) after(combo, "callback", (name) => follow(node, name));
  },
});
