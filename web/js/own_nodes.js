/**
 * Rewrites a saved workflow: ComfyUI's own Lens nodes become this pack's. Pure data, no page.
 *
 * What is followed is the MODEL of a Lens loader: the patches that our MODEL brings along are taken out, and a
 * sampler becomes LensSampler if it takes Euler steps. What has no equal here (another sampler, a scheduler that
 * others use too) stays, and takes our MODEL as it took the other.
 */

// [name, type, is it a widget?] of the inputs that links may end at; [name, type] of the outputs.
const SLOTS = {
  LensModelLoader: {
    inputs: [["model_name", "COMBO", true]],
    outputs: [["MODEL", "MODEL"], ["steps", "INT"], ["cfg", "FLOAT"]],
    size: [330, 140],
  },
  LensEncoderLoader: { inputs: [["encoder_name", "COMBO", true]], outputs: [["CLIP", "CLIP"]], size: [330, 160] },
  LensVAELoader: { inputs: [["vae_name", "COMBO", true]], outputs: [["VAE", "VAE"]], size: [330, 80] },
  LensTextEncode: {
    inputs: [["clip", "CLIP"], ["prompt", "STRING", true], ["negative", "STRING", true]],
    outputs: [["positive", "CONDITIONING"], ["negative", "CONDITIONING"]],
    size: [420, 360],
  },
  LensSampler: {
    inputs: [
      ["model", "MODEL"], ["positive", "CONDITIONING"], ["negative", "CONDITIONING"], ["latent", "LATENT"],
      ["seed", "INT", true], ["steps", "INT", true], ["cfg", "FLOAT", true], ["denoise", "FLOAT", true],
    ],
    outputs: [["LATENT", "LATENT"]],
    size: [320, 330],
  },
  LensVAEDecode: { inputs: [["latent", "LATENT"], ["vae", "VAE"]], outputs: [["IMAGE", "IMAGE"]], size: [240, 80] },
};
const PATCHES = ["ModelSamplingFlux", "CFGNorm"];
const SIZES = ["width", "height"];

/**
 * The workflow with our nodes, and how many of ours it got.
 *
 * @param {object} saved what the page saves; it is not changed
 * @param {(name: string) => boolean} isLens whether a denoiser's file is Lens'
 * @param {(name: string) => boolean} isVae whether a VAE's file is FLUX.2's
 */
export function withOwnNodes(saved, isLens, isVae) {
  const workflow = structuredClone(saved);
  const graphs = [workflow, ...(workflow.definitions?.subgraphs ?? [])];
  const wirings = graphs.map((graph) => new Wiring(graph));
  const swapped = wirings.reduce((sum, wiring) => sum + swapGraph(wiring, isLens, isVae), 0);
  for (const wiring of wirings) {
    wiring.write();
    renamePromoted(graphs, wiring);
  }
  return { workflow, swapped };
}

function swapGraph(wiring, isLens, isVae) {
  const loaders = wiring.ofType("UNETLoader").filter((node) => isLens(node.widgets_values?.[0]));
  const lens = new Set(loaders);
  for (const node of lens) for (const next of wiring.readersOf(node, "MODEL")) lens.add(next);
  for (const node of lens) if (PATCHES.includes(node.type)) wiring.bypass(node, "model");
  const samplers = [...lens].filter((node) => swapSampler(wiring, node));
  const decoders = samplers.flatMap((node) => wiring.readersOf(node, "LATENT"));
  const used = decoders.filter((node) => node.type === "VAEDecode").map((node) => swapDecode(wiring, node, isVae));
  const encoders = wiring.ofType("CLIPLoader").filter((node) => node.widgets_values?.[1] === "lens");
  for (const node of loaders) {
    wiring.become(node, "LensModelLoader", { unet_name: "model_name" }, [node.widgets_values[0], "auto", "none"]);
  }
  for (const node of encoders) {
    wiring.become(node, "LensEncoderLoader", { clip_name: "encoder_name" }, [node.widgets_values[0]]);
  }
  return loaders.length + encoders.length + used.flat().length + 2 * samplers.length;
}

/** KSampler or SamplerCustom with Euler steps: a LensSampler, and one LensTextEncode for both its prompts. */
function swapSampler(wiring, node) {
  const read = { KSampler: readKSampler, SamplerCustom: readSamplerCustom }[node.type];
  const found = read?.(wiring, node);
  const positive = wiring.source(node, "positive");
  const negative = wiring.source(node, "negative");
  const encode = "CLIPTextEncode";
  if (!found || positive?.type !== encode || negative?.type !== encode) return false;
  if (positive === negative || wiring.source(positive, "clip") !== wiring.source(negative, "clip")) return false;
  if ([positive, negative].some((text) => wiring.readersOf(text).some((reader) => reader !== node))) return false;

  roundSize(wiring, wiring.source(node, "latent_image"));
  const { seed, values, scheduler, helpers } = found;
  wiring.become(node, "LensSampler", { latent_image: "latent", [seed]: "seed" }, values);
  if (scheduler) for (const name of ["steps", "denoise"]) wiring.move(scheduler, name, node, name);
  wiring.dropUnread(helpers);

  const prompts = [positive, negative].map((text) => text.widgets_values?.[0] ?? "");
  wiring.become(positive, "LensTextEncode", { text: "prompt" }, prompts);
  wiring.move(negative, "text", positive, "negative");
  for (const link of wiring.from(negative)) Object.assign(link, { origin_id: positive.id, origin_slot: 1 });
  wiring.dropUnread([negative]);
  return true;
}

function readKSampler(wiring, node) {
  const [seed, control, steps, cfg, sampler, , denoise] = node.widgets_values ?? [];
  if (sampler !== "euler") return null;
  return { seed: "seed", values: [seed, control, steps, cfg, "host", denoise], helpers: [] };
}

function readSamplerCustom(wiring, node) {
  const [addNoise, seed, control, cfg] = node.widgets_values ?? [];
  const sampler = wiring.source(node, "sampler");
  const scheduler = wiring.source(node, "sigmas");
  if (addNoise !== true || sampler?.type !== "KSamplerSelect" || sampler.widgets_values?.[0] !== "euler") return null;
  if (scheduler?.type !== "BasicScheduler" || wiring.from(node, 1).length) return null;
  const [, steps, denoise] = scheduler.widgets_values;
  const values = [seed, control, steps, cfg, "host", denoise];
  return { seed: "noise_seed", values, scheduler, helpers: [sampler, scheduler] };
}

/** ComfyUI's Lens template rounds sizes to 8 pixels; Lens' tokens are 16 pixels wide. */
function roundSize(wiring, latent) {
  const sources = latent ? SIZES.map((name) => wiring.source(latent, name)) : [];
  for (const node of sources.filter((source) => source?.type === "ComfyMathExpression")) {
    node.widgets_values = node.widgets_values.map((value) => (value === "a & -8" ? "a & -16" : value));
  }
}

function swapDecode(wiring, node, isVae) {
  const loader = wiring.source(node, "vae");
  wiring.become(node, "LensVAEDecode", { samples: "latent" }, []);
  if (loader?.type !== "VAELoader" || !isVae(loader.widgets_values?.[0])) return [node];
  wiring.become(loader, "LensVAELoader", {}, [loader.widgets_values[0]]);
  return [node, loader];
}

/** Older pages keep a subgraph node's promoted widgets by the inner node's id and the widget's name. */
function renamePromoted(graphs, wiring) {
  const outer = graphs.flatMap((graph) => graph.nodes).filter((node) => node.type === wiring.graph.id);
  for (const node of outer.filter((each) => each.properties?.proxyWidgets)) {
    node.properties.proxyWidgets = node.properties.proxyWidgets.map(
      ([id, name]) => wiring.renamed.get(`${id} ${name}`) ?? [id, name],
    );
  }
}

/** A graph's nodes and links, to be rewired by the names of slots; ``write`` brings the saved form up to date. */
class Wiring {
  constructor(graph) {
    this.graph = graph;
    this.renamed = new Map();
    const names = ["id", "origin_id", "origin_slot", "target_id", "target_slot", "type"];
    this.links = (graph.links ?? []).map((link) =>
      Array.isArray(link) ? Object.fromEntries(names.map((name, index) => [name, link[index]])) : link,
    );
  }

  node(id) {
    return this.graph.nodes.find((node) => node.id === id);
  }

  ofType(type) {
    return this.graph.nodes.filter((node) => node.type === type);
  }

  into(node, name) {
    return this.links.find((link) => link.target_id === node.id && node.inputs[link.target_slot]?.name === name);
  }

  from(node, slot) {
    return this.links.filter((link) => link.origin_id === node.id && (slot ?? link.origin_slot) === link.origin_slot);
  }

  /** The node that an input gets its value from, in this graph. */
  source(node, name) {
    return this.node(this.into(node, name)?.origin_id);
  }

  readersOf(node, type) {
    const links = this.from(node).filter((link) => !type || link.type === type);
    return links.map((link) => this.node(link.target_id)).filter(Boolean);
  }

  /** Take a node out; what read it reads what it read. */
  bypass(node, name) {
    const source = this.into(node, name);
    if (!source) return;
    for (const link of this.from(node)) {
      Object.assign(link, { origin_id: source.origin_id, origin_slot: source.origin_slot });
    }
    this.remove(node);
  }

  /** Make a node one of ours in its place; inputs keep their links by new names, or lose them. */
  become(node, type, renames, values) {
    const slots = SLOTS[type];
    const places = new Map(slots.inputs.map(([name], index) => [name, index]));
    const kept = (link) => link.target_id !== node.id || places.has(nameOf(link));
    const nameOf = (link) => renames[node.inputs[link.target_slot].name] ?? node.inputs[link.target_slot].name;
    this.links = this.links.filter(kept);
    for (const link of this.links) if (link.target_id === node.id) link.target_slot = places.get(nameOf(link));
    for (const [old, name] of Object.entries(renames)) this.rename(node, old, node, name);
    const { models } = node.properties ?? {};
    Object.assign(node, {
      type,
      size: slots.size,
      inputs: slots.inputs.map(([name, kind, widget]) => ({ name, type: kind, ...(widget && { widget: { name } }) })),
      outputs: slots.outputs.map(([name, kind]) => ({ name, type: kind })),
      properties: { cnr_id: "lenspack", "Node name for S&R": type, ...(models && { models }) },
      widgets_values: values,
    });
    for (const own of ["title", "color", "bgcolor"]) delete node[own]; // they spoke of the other node
  }

  /** Let what is linked to one node's input be linked to another's instead. */
  move(from, oldName, to, name) {
    const link = this.into(from, oldName);
    this.rename(from, oldName, to, name);
    if (!link) return;
    Object.assign(link, { target_id: to.id, target_slot: to.inputs.findIndex((slot) => slot.name === name) });
  }

  rename(from, oldName, to, name) {
    this.renamed.set(`${from.id} ${oldName}`, [String(to.id), name]);
  }

  dropUnread(nodes) {
    for (const node of nodes) if (!this.from(node).length) this.remove(node);
  }

  remove(node) {
    this.links = this.links.filter((link) => link.target_id !== node.id && link.origin_id !== node.id);
    this.graph.nodes = this.graph.nodes.filter((other) => other !== node);
  }

  write() {
    const { graph, links } = this;
    const ids = (matching) => links.filter(matching).map((link) => link.id);
    for (const node of graph.nodes) {
      (node.inputs ?? []).forEach((slot, index) => {
        slot.link = ids((link) => link.target_id === node.id && link.target_slot === index)[0] ?? null;
      });
      (node.outputs ?? []).forEach((slot, index) => {
        slot.links = ids((link) => link.origin_id === node.id && link.origin_slot === index);
      });
    }
    // The slots of a subgraph's own two ends.
    (graph.inputs ?? []).forEach((slot, index) => {
      slot.linkIds = ids((link) => link.origin_id === graph.inputNode.id && link.origin_slot === index);
    });
    graph.links = graph.inputNode ? links : links.map((link) => Object.values(pick(link)));
  }
}

/** A link's fields in the order of the saved form of a workflow that has no subgraph around it. */
function pick({ id, origin_id, origin_slot, target_id, target_slot, type }) {
  return { id, origin_id, origin_slot, target_id, target_slot, type };
}
