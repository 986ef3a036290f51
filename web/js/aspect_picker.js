/**
 * The nine shapes of LensEmptyLatent, drawn to scale, to click or to choose with the arrow keys.
 *
 * The combo aspect_ratio stays the value: the picker shows it and sets it, and is neither in the prompt nor in
 * the saved file. The sizes come with the node's description, so that there is one table of them.
 */
import { app } from "../../../scripts/app.js";
import { addStyle, after, asOneStep, inputOf, isWired, replaceWhenRemade, setWidget, widgetOf } from "./host.js";

const NODE = "LensEmptyLatent";
const LONGEST_SIDE = 30;
const HEIGHT = 132;
const MIN_WIDTH = 300;
const STEPS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

/** A row of radio buttons, one for each shape. */
class AspectPicker {
  /** @param {Object<string, Object<string, [number, number]>>} sizes by base resolution and ratio */
  constructor(node, sizes) {
    this.node = node;
    this.sizes = sizes;
    this.ratio = widgetOf(node, "aspect_ratio");
    this.base = widgetOf(node, "base_resolution");
    this.element = document.createElement("div");
    this.element.className = "lens-aspect";
    this.element.setAttribute("role", "radiogroup");
    this.buttons = new Map(Object.keys(Object.values(sizes)[0]).map((ratio) => [ratio, this.#button(ratio)]));
    this.element.append(...this.buttons.values());
    this.element.addEventListener("keydown", (event) => this.#onKey(event));
    this.show();
  }

  #button(ratio) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("role", "radio");
    button.innerHTML = '<span class="lens-aspect-shape"><i></i></span><b></b><small></small>';
    button.querySelector("b").textContent = ratio;
    button.addEventListener("click", () => this.choose(ratio));
    return button;
  }

  /** Draw what the node's values are now. */
  show() {
    const [ratioWired, baseWired] = ["aspect_ratio", "base_resolution"].map((name) => isWired(this.node, name));
    const shapes = this.sizes[this.base.value] ?? Object.values(this.sizes)[0];
    const longest = Math.max(...Object.values(shapes).flat());
    this.element.setAttribute("aria-label", this.ratio.label ?? this.ratio.name);
    this.element.setAttribute("aria-disabled", String(ratioWired));
    this.element.title = ratioWired ? "aspect_ratio comes from its connection." : "";
    const focusable = this.buttons.has(this.ratio.value) ? this.ratio.value : this.buttons.keys().next().value;
    for (const [ratio, button] of this.buttons) {
      const [width, height] = shapes[ratio];
      const box = button.querySelector("i");
      box.style.width = `${(width / longest) * LONGEST_SIDE}px`;
      box.style.height = `${(height / longest) * LONGEST_SIDE}px`;
      button.querySelector("small").textContent = baseWired ? "" : `${width}×${height}`;
      button.setAttribute("aria-label", baseWired ? ratio : `${ratio}, ${width} × ${height} pixels`);
      button.setAttribute("aria-checked", String(!ratioWired && ratio === this.ratio.value));
      button.disabled = ratioWired;
      button.tabIndex = ratio === focusable ? 0 : -1;
    }
  }

  /** @param {string} ratio */
  choose(ratio) {
    if (ratio !== this.ratio.value) asOneStep(() => setWidget(this.node, this.ratio, ratio));
  }

  /** Arrows, Home and End choose and move the focus; everything else is the page's. */
  #onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const ratios = [...this.buttons.keys()];
    const now = ratios.indexOf(document.activeElement?.querySelector("b")?.textContent);
    const next = { Home: 0, End: ratios.length - 1 }[event.key] ?? now + STEPS[event.key];
    if (event.key === " " || event.key === "Enter") event.stopPropagation();
    if (Number.isNaN(next)) return;
    event.preventDefault();
    event.stopPropagation();
    const ratio = ratios.at(next % ratios.length);
    this.choose(ratio);
    this.buttons.get(ratio).focus();
  }
}

function addPicker(node) {
  const sizes = inputOf(NODE, "aspect_ratio")?.[1]?.lens_sizes;
  if (!sizes || !widgetOf(node, "aspect_ratio") || !widgetOf(node, "base_resolution")) return;
  const picker = new AspectPicker(node, sizes);
  const show = () => picker.show();
  const widget = node.addDOMWidget("aspect_picker", "lens_aspect_picker", picker.element, {
    serialize: false, // not in the prompt
    margin: 4,
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  });
  widget.serialize = false; // not in the saved file
  replaceWhenRemade(node, widget);
  for (const combo of [picker.ratio, picker.base]) after(combo, "callback", show);
  for (const event of ["onConfigure", "onConnectionsChange"]) after(node, event, show);
  node.setSize([Math.max(node.size[0], MIN_WIDTH), node.computeSize()[1]]);
}

addStyle("aspect_picker.css");
app.registerExtension({
  name: "lens.aspect_picker",
  nodeCreated(node) {
    if (node.comfyClass === NODE) addPicker(node);
  },
});
