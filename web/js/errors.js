/**
 * The page says only that a node failed; this shows the sentence, and a button to the node's help page.
 */
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { definition, isOurs, makeButton, toast } from "./host.js";
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
  const title = nodeAt(id)?.title ?? definition(type)?.display_name ?? type;
  const mark = `lens-error-${++shown}`;
  toast("error", title, text, { life: LIFE, styleClass: `lens-error ${mark}` });
  if (isOurs(type)) {
    addButton(mark, `Help for ${title}`, () => {
      close(mark); // it would cover the page that it opens
      openHelp(nodeAt(id), type);
    });
  }
}

/** Toasts have texts only, so the button is put into the one that appears. */
function addButton(mark, label, onClick, patience = 20) {
  const text = document.querySelector(`.${mark} .p-toast-message-text`);
  if (!text) {
    if (patience) requestAnimationFrame(() => addButton(mark, label, onClick, patience - 1));
    return;
  }
  text.append(makeButton(label, onClick));
}

/** @param {string} mark a class of the toasts */
function close(mark) {
  for (const button of document.querySelectorAll(`.${mark} .p-toast-close-button`)) button.click();
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

/**
 * There is no event for a refused prompt, so its answer is read on its way to the page, which gets the same
 * promise: this file is in no stack of its errors.
 */
function watchPrompts() {
  const queuePrompt = api.queuePrompt;
  api.queuePrompt = function (...args) {
    const answer = queuePrompt.apply(this, args);
    answer.then(
      (accepted) => showRefusals(accepted?.node_errors),
      (error) => showRefusals(error?.response?.node_errors),
    );
    return answer;
  };
}

function showRefusals(errors) {
  for (const [id, error] of Object.entries(errors ?? {})) {
    if (isOurs(error.class_type)) for (const text of refusals(error)) show(error.class_type, id, text);
  }
}

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
    api.addEventListener("promptQueueing", () => close("lens-error"));
    watchPrompts();
  },
});
