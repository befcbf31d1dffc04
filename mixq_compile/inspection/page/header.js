// What was compiled and what came of it, above everything else.

function showHeader() {
  const { model, inputs, release, notes, seconds } = report.inspection;
  byId("header").replaceChildren(
    element(
      "div",
      { class: "identity" },
      element("span", { class: "brand", title: `Made by mixq-compile ${release}` }, `mixq ${release}`),
      element("h1", { title: model }, element("bdi", null, model || "a graph")),
      inputs ? element("code", { class: "inputs", title: "What the model was captured with" }, inputs) : null,
    ),
    element("dl", { class: "totals" }, totals(currentModel(), seconds)),
    element(
      "div",
      { class: "actions" },
      report.models.length > 1 ? graphSelector() : null,
      action("Search", "/", "Search nodes, layers and passes", openSearch),
      action("Theme", "d", "Light or dark", toggleTheme),
      action("Keys", "?", "What the keys do", openKeys),
    ),
    ...(notes.length > 0 ? [element("div", { class: "notes" }, notes.map((note) => element("p", null, note)))] : []),
  );
}

function totals(model, seconds) {
  const { layers } = model;
  const quantized = layers.filter((layer) => layer.scheme !== null).length;
  const before = sumOf(layers, (layer) => layer.bytes_before);
  const after = sumOf(layers, (layer) => layer.bytes_after);
  return [
    total("layers quantized", `${quantized} of ${layers.length}`),
    total("their weights", `${formatBytes(before)} → ${formatBytes(after)}`, formatChange(before, after)),
    Object.entries(seconds).map(([step, time]) => total(step, formatSeconds(time))),
  ];
}

function total(name, value, aside = "") {
  return element(
    "div",
    null,
    element("dt", null, name),
    element("dd", null, value, aside ? element("span", { class: "aside" }, ` ${aside}`) : null),
  );
}

function action(text, key, title, listener) {
  return element(
    "button",
    { type: "button", class: "action", title, on: { click: listener } },
    text,
    element("kbd", null, key),
  );
}

function graphSelector() {
  const options = report.models.map(({ name, layers }) =>
    element(
      "option",
      { value: name, selected: name === state.graph },
      `graph ${name || "without a name"} (${counted(layers.length, "layer")})`,
    ),
  );
  return element(
    "select",
    { id: "graphs", "aria-label": "Captured graph", on: { change: (event) => go({ graph: event.target.value }) } },
    options,
  );
}

function sumOf(items, valueOf) {
  return items.reduce((sum, item) => sum + valueOf(item), 0);
}
