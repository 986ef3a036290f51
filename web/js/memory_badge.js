/**
 * A line on LensModelLoader and LensSampler: what the choice takes of the memory, before anything is loaded.
 *
 * The server knows (GET /lens/memory), and says it in words; a badge shows what it said, with a colour. It is
 * asked when an answer may have changed, one question at a time, and never while a picture is drawn or nobody
 * looks. The line is neither in the prompt nor in the saved file.
 */
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addStyle, after, ask, choicesOf, inputOf, replaceWhenRemade } from "./host.js";
import { decidingWidget } from "./follow_model.js";
import { placeOf, producer } from "./upstream.js";

const PAUSE = 300;
const HEIGHT = 20;
const QUERIES = { LensModelLoader: queryOfLoader, LensSampler: queryOfSampler };
// Nodes whose settings are in a question.
const DECIDING = new Set([...Object.keys(QUERIES), "LensEncoderLoader", "LensTextEncode", "LensEmptyLatent"]);

/** @type {Map<Object, Badge>} by node */
const badges = new Map();
/** @type {Map<string, Object | null>} by question */
const answers = new Map();
let timer = null;
let asking = false;
let again = false;
let drawing = false;
let outdated = false;

class Badge {
  constructor(node) {
    this.node = node;
    this.element = document.createElement("div");
    this.element.className = "lens-memory";
    this.element.setAttribute("role", "status");
  }

  /** @param {{level: string, line: string, details: string[]} | null} answer null: nothing is known */
  show(answer) {
    this.element.textContent = answer?.line ?? "";
    this.element.title = answer?.details.join("\n") ?? "";
    this.element.dataset.level = answer?.level ?? "";
  }
}

/** A widget's value, also where a subgraph shows it outside; undefined where a node's output decides. */
function valueOf(place, name) {
  return decidingWidget(place, name)?.widget.value;
}

/** A loader's file, if there is such a one; of others there is nothing to say. */
function fileOf(place, name) {
  const file = valueOf(place, name);
  return choicesOf(place.node.comfyClass, name).includes(file) ? file : undefined;
}

/** @returns {Object<string, any> | null} */
function queryOfLoader(place) {
  const model = fileOf(place, "model_name");
  const [dtype, quantization] = ["dtype", "quantization"].map((name) => valueOf(place, name));
  return model && dtype && quantization ? { model, dtype, quantization } : null;
}

function queryOfSampler(place) {
  const loader = producer(place, "model", ["LensModelLoader"]);
  const query = loader && queryOfLoader(loader);
  if (!query) return null;
  const steps = valueOf(place, "steps");
  return { ...query, ...encoderOf(place), ...pictureOf(place), ...(steps && { steps }) };
}

function encoderOf(place) {
  const encode = producer(place, "positive", ["LensTextEncode", "CLIPTextEncode"]);
  const loader = encode && producer(encode, "clip", ["LensEncoderLoader"]);
  const encoder = loader && fileOf(loader, "encoder_name");
  if (!encoder) return {};
  return { encoder, placement: valueOf(loader, "placement"), experts: valueOf(loader, "experts") };
}

function pictureOf(place) {
  const latent = producer(place, "latent", ["LensEmptyLatent"]);
  if (!latent) return {};
  const [base, ratio, batch] = ["base_resolution", "aspect_ratio", "batch_size"].map((name) => valueOf(latent, name));
  const size = inputOf("LensEmptyLatent", "aspect_ratio")?.[1]?.lens_sizes?.[base]?.[ratio];
  return { ...(size && { width: size[0], height: size[1] }), ...(batch && { batch }) };
}

/** The question of a node, "" where nothing is known. */
function questionOf(node) {
  const query = node.graph ? QUERIES[node.comfyClass](placeOf(node)) : null;
  const known = Object.entries(query ?? {}).filter(([, value]) => value !== undefined);
  return known.length ? `/lens/memory?${new URLSearchParams(known)}` : "";
}

/** Look again soon; `anew`: what is free may be another amount now. */
function refresh(anew = false) {
  outdated ||= anew;
  clearTimeout(timer);
  timer = setTimeout(update, PAUSE);
}

async function update() {
  if (asking) {
    again = true;
    return;
  }
  if (drawing || document.hidden) return; // looked at again when that ends
  asking = true;
  if (outdated) answers.clear();
  outdated = false;
  try {
    for (const [node, badge] of [...badges]) await updateOne(badge, questionOf(node));
  } finally {
    asking = false;
    if (again) {
      again = false;
      refresh();
    }
  }
}

async function updateOne(badge, question) {
  if (question && !answers.has(question)) {
    // A choice that the server refuses is the loader's to explain.
    answers.set(question, await ask(question).catch(() => null));
  }
  badge.show(question ? answers.get(question) : null);
}

function addBadge(node) {
  const badge = new Badge(node);
  const widget = node.addDOMWidget("memory_badge", "lens_memory_badge", badge.element, {
    serialize: false, // not in the prompt
    margin: 2,
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  });
  widget.serialize = false; // not in the saved file
  replaceWhenRemade(node, widget);
  badges.set(node, badge);
  after(node, "onRemoved", () => badges.delete(node));
}

addStyle("memory_badge.css");
app.registerExtension({
  name: "lens.memory_badge",
  setup() {
    api.addEventListener("graphChanged", () => refresh());
    api.addEventListener("status", ({ detail }) => {
      const before = drawing;
      drawing = (detail?.exec_info?.queue_remaining ?? 0) > 0;
      if (before && !drawing) refresh(true);
    });
    document.addEventListener("visibilitychange", () => refresh(true));
  },
  refreshComboInNodes: () => refresh(true),
  afterConfigureGraph: () => refresh(),
  nodeCreated(node) {
    if (node.comfyClass in QUERIES) addBadge(node);
    if (!DECIDING.has(node.comfyClass)) return;
    for (const widget of node.widgets ?? []) after(widget, "callback", () => refresh());
    for (const event of ["onAdded", "onConnectionsChange"]) after(node, event, () => refresh());
  },
});
