/**
 * The page says only that a node failed; this shows the sentence, and a button to the node's help page.
 */
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addStyle, definition, isOurs, toast } from "./host.js";
import { openHelp } from "./help.js";
import { isOwnError, refusals, sentence } from "./words_of_errors.js";

const LIFE = 30000;
let shown = 0;
/** @type {{type: string, id: string} | undefined} */
let failed;

/**
 * @param {string} type
 * @param {string} id as the server names it: 5, or 3:5 inside of subgraph node 3
 * @param {string} text
 */
function show(type, id, text) {
  failed = { type, id };
  const node = nodeAt(id);
  const title = node?.title ?? definition(type)?.display_name ?? type;
  const mark = `lens-error-${++shown}`;
  toast("error", title, text, { life: LIFE, styleClass: `lens-error ${mark}` });
  if (isOurs(type)) addButton(mark, title, () => openHelp(node, type));
}

/** Toasts have texts only, so the button is put into the one that appears. */
function addButton(mark, title, onClick, patience = 20) {
  const text = document.querySelector(`.${mark} .p-toast-message-text`);
  if (!text) {
    if (patience) requestAnimationFrame(() => addButton(mark, title, onClick, patience - 1));
    return;
  }
  const button = document.createElement("button");
  button.type = "button";
  button.className = "lens-error-help";
  button.textContent = `Help for ${title}`;
  button.addEventListener("click", onClick);
  text.append(button);
}

function nodeAt(id) {
  const [outermost, ...inner] = String(id).split(":");
  return inner.reduce(
    (node, each) => node?.subgraph?.getNodeById(each),
    app.rootGraph.getNodeById(outermost),
  );
}

function onError({ detail }) {
  if (isOurs(detail.node_type) || isOwnError(detail)) show(detail.node_type, detail.node_id, sentence(detail));
}

/** There is no event for a refused prompt, so its answer is read on its way to the page. */
function watchPrompts() {
  const queuePrompt = api.queuePrompt;
  api.queuePrompt = async function (...args) {
    try {
      const answer = await queuePrompt.apply(this, args);
      showRefusals(answer?.node_errors);
      return answer;
    } catch (error) {
      showRefusals(error?.response?.node_errors);
      throw error;
    }
  };
}

function showRefusals(errors) {
  for (const [id, error] of Object.entries(errors ?? {})) {
    if (isOurs(error.class_type)) for (const text of refusals(error)) show(error.class_type, id, text);
  }
}

addStyle("errors.css");
app.registerExtension({
  name: "lens.errors",
  commands: [
    {
      id: "Lens.HelpForFailedNode",
      label: "Lens: help for the node that failed",
      icon: "pi pi-question-circle",
      function: () => {
        if (failed && isOurs(failed.type)) openHelp(nodeAt(failed.id), failed.type);
        else toast("info", "Lens", "No node of Lens has failed since the page was opened.");
      },
    },
  ],
  setup() {
    api.addEventListener("execution_error", onError);
    watchPrompts();
  },
});
