/**
 * What the modules beside this one ask of ComfyUI's page.
 */
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

/** This pack's folder, whatever it is called: /extensions/<folder>/js/host.js. */
const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-3));

/**
 * Whether a node type is one of this pack's; other packs may have names that begin with Lens.
 * @param {string} type
 */
export function isOurs(type) {
  return definition(type)?.python_module === `custom_nodes.${FOLDER}`;
}

/**
 * A node type as the server describes it, or undefined.
 * @param {string} type
 */
export function definition(type) {
  return window.LiteGraph.registered_node_types[type]?.nodeData;
}

/**
 * The name and the options of an input in the server's description: [type or choices, options].
 * @param {string} type
 * @param {string} input
 * @returns {[any, Object<string, any>] | undefined}
 */
export function inputOf(type, input) {
  const { required, optional } = definition(type)?.input ?? {};
  return required?.[input] ?? optional?.[input];
}

/**
 * The choices of a combo, which stand in one of two places of its description.
 * @param {string} type
 * @param {string} input
 * @returns {string[]}
 */
export function choicesOf(type, input) {
  const [first, options] = inputOf(type, input) ?? [];
  return Array.isArray(first) ? first : (options?.options ?? []);
}

/** @param {string} name */
export function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

/**
 * Whether a widget's value comes from a connection.
 * @param {string} name
 */
export function isWired(node, name) {
  return node.inputs?.some((input) => input.widget?.name === name && input.link != null) ?? false;
}

/**
 * Call `then` after one of the object's own functions, which may not be there.
 * @param {Object} owner
 * @param {string} name
 * @param {Function} then
 */
export function after(owner, name, then) {
  const before = owner[name];
  owner[name] = function (...args) {
    const result = before?.apply(this, args);
    then.apply(this, args);
    return result;
  };
}

/**
 * Undo and reload make every node anew, and Nodes 2.0 goes on showing the old node's element where the new one
 * has its id: put the new one's there.
 * @param {Object} widget of addDOMWidget
 */
export function replaceWhenRemade(node, widget) {
  after(node, "onRemoved", () => {
    const { id } = node;
    requestAnimationFrame(() => {
      const old = widget.element;
      const heir = app.canvas.graph?.getNodeById(id);
      const element = heir && heir !== node && widgetOf(heir, widget.name)?.element;
      if (!element || element.isConnected || !old.isConnected) return;
      const focused = old.contains(document.activeElement);
      old.replaceWith(element);
      if (focused) element.querySelector("[tabindex='0']")?.focus();
    });
  });
}

/** Set a widget as a person does: other extensions hear of it. */
export function setWidget(node, widget, value) {
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
}

/**
 * Everything that `change` does is one step of undo. Without this the page would look for changes at the
 * next click or key only, or in the middle.
 * @param {() => void} change
 */
export function asOneStep(change) {
  app.canvas.emitBeforeChange();
  try {
    change();
  } finally {
    app.canvas.emitAfterChange();
    app.canvas.setDirty(true, true);
  }
}

/** @param {string} id */
export function setting(id) {
  return app.extensionManager.setting.get(id);
}

/**
 * @param {"info" | "success" | "warn" | "error"} severity
 * @param {string} summary
 * @param {string} detail
 * @param {Object} [more] what PrimeVue's toast takes besides
 */
export function toast(severity, summary, detail, more = {}) {
  app.extensionManager.toast.add({ severity, summary, detail, life: 8000, ...more });
}

/**
 * @param {string} text
 * @param {() => void} onClick
 */
export function makeButton(text, onClick) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "lens-button";
  button.textContent = text;
  button.addEventListener("click", onClick);
  return button;
}

/**
 * The JSON of one of this pack's routes; throws the server's own sentence where it refuses.
 * @param {string} route
 * @param {RequestInit} [options]
 */
export async function ask(route, options) {
  const answer = await api.fetchApi(route, options);
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ?? `${route} answered ${answer.status}.`);
  return found;
}

/**
 * Load a style sheet that lies beside the modules.
 * @param {string} name
 */
export function addStyle(name) {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL(`../css/${name}`, import.meta.url).href;
  document.head.append(link);
}

addStyle("page.css");
