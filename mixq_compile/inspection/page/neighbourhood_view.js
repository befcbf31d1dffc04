// The drawings of what the chosen pass changed, and what lies around it.

const LEAST_SCALE = 0.7;

function showNeighbourhood(container, model) {
  const record = model.record(state.pass);
  if (record === null) {
    const text = "Choose a pass: its changes are drawn with their surroundings.";
    container.append(emptyMessage("Nothing to draw", text));
    return null;
  }
  const drawn = model.neighbourhoods[state.pass];
  container.append(element("div", { class: "view-head" }, passSummary(record)));
  if (drawn === undefined) {
    const text = model.hasSnapshots ? "This pass changed nothing." : "This run recorded no graphs.";
    container.append(emptyMessage("Nothing to draw", text));
    return null;
  }
  const pictures = drawn.pictures.filter(pictureFilter(model));
  container.append(pictureLegend());
  if (pictures.length === 0) container.append(emptyMessage("Nothing here", `No drawing is of ${state.layer}.`));
  container.append(...pictures.map(pictureElement));
  if (drawn.kinds_left_out > 0) {
    const text = `${counted(drawn.kinds_left_out, "further kind")} of change are not drawn.`;
    container.append(element("p", { class: "quiet" }, text));
  }
  return null;
}

/** Pictures of layers that the filter means, or of layers that are like one of them. */
function pictureFilter(model) {
  const passes = layerFilter(state.layer, model.layersByName);
  return ({ kind, layer }) => passes(layer) || (state.layer !== "" && numberless(state.layer) === kind);
}

function pictureElement({ kind, layer, alike, left_out: leftOut, svg }) {
  const name = layer || "nodes outside of all modules";
  return element(
    "figure",
    { class: "picture" },
    element(
      "figcaption",
      null,
      element("h3", null, element("code", null, kind || name)),
      alike > 1 ? element("span", { class: "quiet" }, `drawn for ${name}, one of ${alike} alike`) : null,
      leftOut > 0
        ? element("span", { class: "quiet" }, `${counted(leftOut, "node")} within two edges not drawn`)
        : null,
    ),
    element("div", { class: "picture-scroll" }, drawingOf(svg)),
  );
}

/** The drawing as an element. A policy in the page's head keeps anything in it from running. */
function drawingOf(svg) {
  const drawing = document.importNode(new DOMParser().parseFromString(svg, "image/svg+xml").documentElement, true);
  drawing.style.minWidth = `${LEAST_SCALE * drawing.getAttribute("width")}px`;
  return drawing;
}

function pictureLegend() {
  const kinds = [
    ["added", "+ added"],
    ["removed", `${MINUS} removed`],
    ["changed", "~ changed"],
    ["context", "untouched"],
  ];
  return element(
    "p",
    { class: "legend picture-legend" },
    kinds.map(([kind, text]) => element("span", null, element("span", { class: `swatch box-${kind}` }), ` ${text}`)),
    element("span", { class: "quiet" }, "Data flows from left to right; click a node for its card."),
  );
}
