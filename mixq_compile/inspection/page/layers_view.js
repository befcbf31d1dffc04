// The blast radius: layers down, passes across, then what each layer holds and costs.

const openedGroups = new Set();
const layerSort = { column: "", falls: false };

function showLayers(container, model) {
  const passes = layerFilter(state.layer, model.layersByName);
  const layers = model.layers.filter((layer) => passes(layer.fqn));
  if (layers.length === 0) {
    const text = model.layers.length > 0 ? `No layer is named like ${state.layer}.` : "This graph has no linears.";
    container.append(emptyMessage("No layers", text));
    return null;
  }
  const columns = layerColumns(model, layers);
  const groups = sortedGroups(groupsOfLayers(model, layers), columns);
  const redraw = () => showView({ keepsPlace: true });
  container.append(
    element("div", { class: "view-head" }, layersSummary(layers, groups, redraw)),
    element(
      "table",
      { class: "matrix", "aria-label": "Layers and what each pass did to them" },
      matrixHead(columns, redraw),
      element("tbody", null, groups.map((group) => groupRows(group, columns, redraw))),
      matrixFoot(layers, columns),
    ),
  );
  return null;
}

function layersSummary(layers, groups, redraw) {
  const several = groups.filter((group) => group.layers.length > 1);
  const everyOpen = several.every((group) => openedGroups.has(group.key));
  const toggleAll = () => {
    several.forEach((group) => (everyOpen ? openedGroups.delete(group.key) : openedGroups.add(group.key)));
    redraw();
  };
  const about = several.length > 0 ? `in ${counted(groups.length, "row")} of layers alike` : "";
  return [
    element(
      "div",
      { class: "pass-summary" },
      element("h2", null, counted(layers.length, "layer")),
      element("span", { class: "quiet" }, about),
    ),
    element(
      "span",
      { class: "legend" },
      ["added", "removed", "changed"].map((kind) =>
        element("span", null, element("span", { class: `ink-${kind}` }, SIGNS[kind]), ` ${kind}`),
      ),
      element("span", null, element("span", { class: "kept" }, "kept"), " left alone, with a reason"),
    ),
    element(
      "button",
      {
        type: "button",
        class: "action",
        id: "fold-passes",
        "data-focus": "fold passes",
        "aria-pressed": String(taste.foldPasses),
        title: "The columns that say what each pass did to each layer",
        on: {
          click: () => {
            rememberTaste({ foldPasses: !taste.foldPasses });
            redraw();
          },
        },
      },
      taste.foldPasses ? "Show passes" : "Hide passes",
    ),
    several.length > 0
      ? element(
          "button",
          { type: "button", class: "action", id: "expand-all", "data-focus": "expand all", on: { click: toggleAll } },
          everyOpen ? "Collapse all" : "Expand all",
        )
      : null,
  ];
}

function matrixHead(columns, redraw) {
  const sortBy = (key) => {
    // A third click returns to the order in which the layers run.
    if (layerSort.column !== key) Object.assign(layerSort, { column: key, falls: false });
    else if (!layerSort.falls) layerSort.falls = true;
    else layerSort.column = "";
    redraw();
  };
  const heading = ({ key, title, hint, kind, pass }) => {
    const order = layerSort.column === key ? (layerSort.falls ? "descending" : "ascending") : null;
    return element(
      "th",
      { scope: "col", class: `${kind}${pass === state.pass ? " current" : ""}`, "aria-sort": order },
      element(
        "button",
        { type: "button", title: hint ?? title, "data-focus": `column ${key}`, on: { click: () => sortBy(key) } },
        element("span", null, title),
      ),
    );
  };
  const headings = [{ key: "layer", title: "layer", kind: "layer" }, ...columns].map(heading);
  return element("thead", null, element("tr", null, headings));
}

function matrixFoot(layers, columns) {
  const cells = columns.map((column) =>
    element("td", { class: column.kind }, column.total ? column.total(layers) : ""),
  );
  const heading = element("th", { scope: "row", class: "layer" }, "all of these");
  return element("tfoot", null, element("tr", null, heading, cells));
}

function groupRows(group, columns, redraw) {
  const several = group.layers.length > 1;
  const opened = several && openedGroups.has(group.key);
  const toggle = () => {
    if (opened) openedGroups.delete(group.key);
    else openedGroups.add(group.key);
    redraw();
  };
  const expander = several ? expanderButton(group.name, opened, toggle) : null;
  const rowOf = (name, layers, expands, className) =>
    layerRow(name, layers, group.touches, columns, expands, className);
  const members = opened ? group.layers : [];
  return [
    rowOf(group.name, group.layers, expander, several ? "group" : ""),
    ...members.map((layer) => rowOf(layer.fqn, [layer], null, "member")),
  ];
}

function layerRow(name, layers, touches, columns, expander, className) {
  const heading = element(
    "th",
    { scope: "row", class: "layer" },
    element(
      "div",
      null,
      expander,
      layerLink(name),
      layers.length > 1 ? element("span", { class: "times" }, `×${layers.length}`) : null,
    ),
  );
  const cells = columns.map((column) =>
    column.kind === "by-pass"
      ? passCell(name, touches[column.place], column)
      : element("td", { class: column.kind }, column.show(layers)),
  );
  return element("tr", { class: className }, heading, cells);
}

function passCell(name, touch, { pass }) {
  const mark = markOf(touch);
  const show = () => go({ pass, layer: name, view: mark === "kept" ? "decisions" : "changes" });
  return element(
    "td",
    { class: `by-pass${pass === state.pass ? " current" : ""}` },
    mark === ""
      ? null
      : element(
          "button",
          { type: "button", class: "mark", title: `Pass ${pass} and ${name}: ${mark}`, on: { click: show } },
          mark === "kept" ? element("span", { class: "kept" }, mark) : mark.split(" ").flatMap(markPart),
        ),
  );
}

function markPart(part, index) {
  const kind = Object.keys(SIGNS).find((name) => SIGNS[name] === part[0]);
  return [index > 0 ? " " : null, element("span", { class: `ink-${kind}` }, part)];
}

function sortedGroups(groups, columns) {
  const column = [{ key: "layer" }, ...columns].find(({ key }) => key === layerSort.column);
  if (column === undefined) return groups;
  const sign = layerSort.falls ? -1 : 1;
  const valueOf = (group) => {
    if (column.key === "layer") return group.name;
    if (column.kind === "by-pass") {
      const { added, removed, changed, skipped } = group.touches[column.place];
      return added + removed + changed || skipped / 1e6;
    }
    return sortedLayers(group.layers, column, sign).map(column.valueOf)[0];
  };
  return groups
    .map((group) => ({ ...group, value: valueOf(group), layers: sortedLayers(group.layers, column, sign) }))
    .sort((a, b) => compareValues(a.value, b.value, sign));
}

function sortedLayers(layers, column, sign) {
  if (!column.valueOf) return layers;
  return [...layers].sort((a, b) => compareValues(column.valueOf(a), column.valueOf(b), sign));
}

/** What was not measured comes last, whichever way the column is sorted. */
function compareValues(left, right, sign) {
  if (left === null || right === null) return (left === null) - (right === null);
  if (typeof left === "string") return sign * left.localeCompare(right, "en", { numeric: true });
  return sign * (left - right);
}
