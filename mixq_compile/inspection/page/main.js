// Puts the page together and keeps it in step with its state.

const VIEW_MAKERS = {
  changes: showChanges,
  program: showProgram,
  layers: showLayers,
  decisions: showDecisions,
  charts: showCharts,
  neighbourhood: showNeighbourhood,
};
const places = new Map();
let shownView = null;
let shownKey = "";

function viewKey() {
  const { graph, pass, view, layer } = state;
  return JSON.stringify([graph, pass, view, layer]);
}

function showToolbar() {
  const filter = element("input", {
    type: "search",
    id: "layer-filter",
    list: "layer-names",
    placeholder: "Filter by layer: name, part, glob",
    "aria-label": "Filter by layer",
    autocomplete: "off",
    on: { input: (event) => go({ layer: event.target.value }, { replaces: true }) },
  });
  const tabs = VIEWS.map(([view, text]) =>
    element(
      "button",
      { type: "button", role: "tab", id: `tab-${view}`, "aria-controls": "view", on: { click: () => go({ view }) } },
      text,
    ),
  );
  byId("toolbar").replaceChildren(
    element("div", { class: "tabs", role: "tablist", "aria-label": "Views", on: { keydown: steerTabs } }, tabs),
    element(
      "div",
      { class: "layer-field" },
      filter,
      closeButton("clear-layer", "Show all layers", () => go({ layer: "" })),
      element("datalist", { id: "layer-names" }),
    ),
  );
}

function steerTabs(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step === undefined) return;
  const place = VIEWS.findIndex(([view]) => view === state.view) + step + VIEWS.length;
  go({ view: VIEWS[place % VIEWS.length][0] });
  byId(`tab-${state.view}`).focus();
}

function updateToolbar() {
  for (const [view] of VIEWS) {
    const tab = byId(`tab-${view}`);
    tab.setAttribute("aria-selected", String(view === state.view));
    tab.tabIndex = view === state.view ? 0 : -1;
  }
  byId("view").setAttribute("aria-labelledby", `tab-${state.view}`);
  const filter = byId("layer-filter");
  if (filter.value !== state.layer) filter.value = state.layer;
  filter.classList.toggle("active", state.layer !== "");
  byId("clear-layer").hidden = state.layer === "";
}

/** Draws the view again. */
function showView({ keepsPlace }) {
  const container = byId("view");
  const place = container.scrollTop;
  showTooltip(null);
  container.className = `view view-${state.view}`;
  keepingFocus(() => {
    container.replaceChildren();
    shownView = VIEW_MAKERS[state.view](container, currentModel());
  });
  container.scrollTop = keepsPlace ? place : 0;
}

/** Shows the view of the state, where the reader left it or at the chosen node. */
function showOtherView() {
  const container = byId("view");
  places.set(shownKey, container.scrollTop);
  shownKey = viewKey();
  showView({ keepsPlace: false });
  if (places.has(shownKey)) container.scrollTop = places.get(shownKey);
  else if (state.node !== "") shownView?.revealNode?.();
}

function markChosenNode() {
  const container = byId("view");
  container.querySelectorAll(".chosen").forEach((named) => named.classList.remove("chosen"));
  if (state.node === "") return;
  const mark = () => {
    const named = container.querySelectorAll(`[data-node="${CSS.escape(state.node)}"]`);
    named.forEach((found) => found.classList.add("chosen"));
    return [...named].some((found) => isInSight(found, container));
  };
  if (!mark()) {
    shownView?.revealNode?.();
    mark();
  }
}

function isInSight(target, container) {
  const [own, around] = [target.getBoundingClientRect(), container.getBoundingClientRect()];
  return own.bottom > around.top && own.top < around.bottom;
}

function showState(previous) {
  const model = currentModel();
  const graphChanged = previous === null || previous.graph !== state.graph;
  if (graphChanged) {
    showHeader();
    byId("layer-names").replaceChildren(...model.layers.map(({ fqn }) => element("option", { value: fqn })));
  }
  updateToolbar();
  if (graphChanged || previous.pass !== state.pass) showPasses();
  // The card takes room from the view, whose lines are wrapped to what is left.
  showCard(model);
  if (shownKey !== viewKey()) showOtherView();
  if (previous?.node !== state.node) markChosenNode();
}

function watchWidth() {
  let width = byId("view").clientWidth;
  new ResizeObserver(() => {
    if (byId("view").clientWidth === width) return;
    width = byId("view").clientWidth;
    shownView?.resized?.();
  }).observe(byId("view"));
}

function showFailure(error) {
  byId("view").replaceChildren(emptyMessage("This report cannot be shown", String(error)));
  throw error;
}

async function start() {
  const { inspection, neighbourhoods } = await readIsland();
  report.inspection = inspection;
  report.models = inspection.graphs.map((graph, index) => new GraphModel(graph, neighbourhoods[index]));
  if (report.models.length === 0) {
    byId("view").append(emptyMessage("No graphs", "This inspection holds no captured graph."));
    return;
  }
  showToolbar();
  showPassPanel();
  let started = false;
  followAddress((previous) => {
    showState(started ? previous : null);
    started = true;
  });
  listenToKeys();
  watchWidth();
}

recallTaste();
applyTheme();
start().catch(showFailure);
