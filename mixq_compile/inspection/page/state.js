// What is shown, as the fragment of the address, and what is remembered of the reader's taste.

const VIEWS = [
  ["changes", "Changes"],
  ["program", "Program"],
  ["layers", "Layers"],
  ["decisions", "Decisions"],
  ["charts", "Charts"],
  ["neighbourhood", "Neighbourhood"],
];
const TASTE = "mixq-report";

const report = { inspection: null, models: [] };
const state = { graph: "", pass: 0, view: "layers", layer: "", node: "" };
const taste = { theme: "", split: false, hideInconsequential: true, foldPasses: false };
let stateChanged = () => {};

function currentModel() {
  return report.models.find((model) => model.name === state.graph) ?? report.models[0];
}

/** Shows something else. Typing replaces the entry in the browser's history, everything else adds one. */
function go(changes, { replaces = false } = {}) {
  const next = { ...state, ...changes };
  if (next.graph !== state.graph) {
    const model = report.models.find((candidate) => candidate.name === next.graph);
    Object.assign(next, { pass: firstPass(model), node: "", ...changes });
  }
  const fragment = fragmentOf(next);
  if (fragment === fragmentOf(state)) return;
  if (replaces) history.replaceState(null, "", fragment);
  else history.pushState(null, "", fragment);
  adopt(next);
}

function fragmentOf({ graph, pass, view, layer, node }) {
  const parts = new URLSearchParams();
  if (graph !== "") parts.set("graph", graph);
  parts.set("pass", String(pass));
  parts.set("view", view);
  if (layer !== "") parts.set("layer", layer);
  if (node !== "") parts.set("node", node);
  return `#${parts}`;
}

/** The state that an address names; whatever it does not name, or names wrongly, is as at the beginning. */
function stateOfFragment(fragment) {
  const parts = new URLSearchParams(fragment.replace(/^#/, ""));
  const graph = parts.get("graph") ?? "";
  const model = report.models.find((candidate) => candidate.name === graph) ?? report.models[0];
  const view = parts.get("view") ?? "";
  const pass = Number.parseInt(parts.get("pass") ?? String(firstPass(model)), 10);
  return {
    graph: model?.name ?? "",
    pass: Math.max(0, Math.min(Number.isNaN(pass) ? 0 : pass, model?.records.length ?? 0)),
    view: VIEWS.some(([name]) => name === view) ? view : firstView(model),
    layer: parts.get("layer") ?? "",
    node: parts.get("node") ?? "",
  };
}

/** The first pass that changed something; the captured graph where none did. */
function firstPass(model) {
  return model?.records.find((record) => hasChanges(record.diff))?.index ?? 0;
}

function firstView(model) {
  return model?.layers.length ? "layers" : "changes";
}

function adopt(next) {
  const previous = { ...state };
  Object.assign(state, next);
  stateChanged(previous);
}

function followAddress(listener) {
  stateChanged = listener;
  window.addEventListener("hashchange", () => adopt(stateOfFragment(location.hash)));
  adopt(stateOfFragment(location.hash));
}

/** Where a page opened from a disk may store nothing, the taste lasts as long as the page. */
function recallTaste() {
  try {
    Object.assign(taste, JSON.parse(localStorage.getItem(TASTE) ?? "{}"));
  } catch {
    return;
  }
}

function rememberTaste(changes) {
  Object.assign(taste, changes);
  try {
    localStorage.setItem(TASTE, JSON.stringify(taste));
  } catch {
    return;
  }
}

function applyTheme() {
  if (taste.theme) document.documentElement.dataset.theme = taste.theme;
}

function toggleTheme() {
  const dark = taste.theme ? taste.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  rememberTaste({ theme: dark ? "light" : "dark" });
  applyTheme();
}
