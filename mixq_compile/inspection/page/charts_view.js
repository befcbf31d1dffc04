// Each layer's error, outlier columns and memory as bars.

const CHART_HEIGHT = 170;
const AXIS_WIDTH = 56;
const LABEL_HEIGHT = 26;
const WIDEST_BAR = 22;
const SECTION_GAP = 10;
const LETTER = 6.6;
const BOARD_PADDING = 32;
const ORDERS = [
  ["run", "As they run", "In the order in which the layers run"],
  ["kind", "By kind", "Layers of one kind beside each other"],
  ["value", "By value", "Largest first; smallest first where small is bad"],
];
let chartOrder = "kind";

function showCharts(container, model) {
  const passes = layerFilter(state.layer, model.layersByName);
  const layers = model.layers.filter((layer) => passes(layer.fqn));
  if (layers.length === 0) {
    container.append(emptyMessage("No layers", state.layer ? `No layer is named like ${state.layer}.` : ""));
    return null;
  }
  const choose = (order) => {
    chartOrder = order;
    showView({ keepsPlace: true });
  };
  container.append(
    element(
      "div",
      { class: "view-head" },
      element("div", { class: "pass-summary" }, element("h2", null, counted(layers.length, "layer"))),
      segmented("Order of the layers", ORDERS, chartOrder, choose),
    ),
  );
  const board = element("div", { class: "charts" });
  container.append(board);
  const draw = () => {
    const charts = chartsOf(layers);
    board.replaceChildren();
    const room = board.clientWidth - BOARD_PADDING;
    board.append(...charts.map((chart) => chartElement(chart, layers, room)));
  };
  draw();
  return { resized: draw };
}

/** Charts: {title, about, absent, smallIsBad, series, format, tick}; a series is {name, valueOf(layer)}. */
function chartsOf(layers) {
  const quantized = layers.filter((layer) => layer.scheme !== null);
  return [
    {
      title: "Error",
      about: "SQNR of each layer's own output in decibels: more is better, 6 dB are one bit.",
      absent: "The error was not measured: the model was not run, or nothing was quantized.",
      smallIsBad: true,
      series: [{ name: "SQNR", valueOf: (layer) => layer.sqnr_db }],
      format: (value) => `${value.toFixed(1)} dB`,
      tick: (value) => String(value),
    },
    {
      title: "Outlier columns",
      about: "Columns kept in the model's own precision, of the most that there may be.",
      absent: quantized.some((layer) => layer.capacity > 0)
        ? "The outlier columns were not counted: the model was not run."
        : "No layer's scheme keeps outlier columns.",
      smallIsBad: false,
      series: [
        { name: "capacity", valueOf: (layer) => layer.capacity || null },
        { name: "found", valueOf: (layer) => layer.found_columns },
      ],
      format: (value) => counted(value, "column"),
      tick: (value) => String(value),
    },
    {
      title: "Memory",
      about: "Bytes of each layer's weight, before and after.",
      absent: "The sizes of the weights are not known.",
      smallIsBad: false,
      series: [
        { name: "before", valueOf: (layer) => layer.bytes_before || null },
        { name: "after", valueOf: (layer) => layer.bytes_after || null },
      ],
      format: formatBytes,
      tick: formatBytes,
      binary: true,
    },
  ];
}

function chartElement(chart, layers, width) {
  const valueOf = chart.series.at(-1).valueOf;
  const missing = layers.filter((layer) => valueOf(layer) === null);
  const heading = [element("h3", null, chart.title), element("p", { class: "quiet" }, chart.about)];
  if (missing.length === layers.length) {
    return element("section", { class: "chart" }, heading, emptyMessage("Not measured", chart.absent));
  }
  return element(
    "section",
    { class: "chart" },
    heading,
    chart.series.length > 1 ? chartLegend(chart.series) : null,
    chartSvg(chart, orderedForChart(layers, chart), width),
    element(
      "p",
      { class: "quiet chart-foot" },
      chart.smallIsBad ? worstLayer(layers, chart, valueOf) : null,
      missing.length > 0 ? element("span", null, missingText(missing, layers)) : null,
    ),
  );
}

function worstLayer(layers, chart, valueOf) {
  const [worst] = [...layers].sort((a, b) => compareValues(valueOf(a), valueOf(b), 1));
  return element("span", null, `Lowest: ${chart.format(valueOf(worst))} in `, layerLink(worst.fqn));
}

function chartLegend(series) {
  return element(
    "p",
    { class: "legend" },
    series.map(({ name }, index) =>
      element("span", null, element("span", { class: `swatch ${barClass(series, index)}` }), ` ${name}`),
    ),
  );
}

/** The last series is what came out; one before it is what it is compared with. */
function barClass(series, index) {
  return index === series.length - 1 ? "bar-main" : "bar-ground";
}

function missingText(missing, layers) {
  const names = [...new Set(missing.map((layer) => numberless(layer.fqn)))];
  const listed = names.slice(0, 4).join(", ") + (names.length > 4 ? ", …" : "");
  return `Not measured for ${missing.length} of ${counted(layers.length, "layer")}: ${listed}.`;
}

/** The layers in the chosen order, in sections {name, layers}. */
function orderedForChart(layers, { series, smallIsBad }) {
  if (chartOrder === "run") return [{ name: "", layers }];
  if (chartOrder === "value") {
    const valueOf = series.at(-1).valueOf;
    const sign = smallIsBad ? 1 : -1;
    const sorted = [...layers].sort((a, b) => compareValues(valueOf(a), valueOf(b), sign));
    return [{ name: "", layers: sorted }];
  }
  const kinds = Map.groupBy(layers, (layer) => numberless(layer.fqn));
  const names = shortNames([...kinds.keys()]);
  return [...kinds].map(([kind, members]) => ({ name: names.get(kind), layers: members }));
}

/** Of each dotted name, as many of its last parts as tell it from the others. */
function shortNames(names) {
  const tailOf = (name, length) => name.split(".").slice(-length).join(".");
  const isShared = (tail, length) => names.filter((name) => tailOf(name, length) === tail).length > 1;
  const shortened = new Map();
  for (const name of names) {
    let length = 1;
    while (tailOf(name, length) !== name && isShared(tailOf(name, length), length)) length += 1;
    shortened.set(name, tailOf(name, length));
  }
  return shortened;
}

function chartSvg(chart, sections, available) {
  const room = available - AXIS_WIDTH - SECTION_GAP * (sections.length - 1);
  const step = stepOfBars(sections, room);
  const spans = sections.map((section) => spanOf(section, step));
  const width = AXIS_WIDTH + sumOf(spans, (span) => span) + SECTION_GAP * (sections.length - 1);
  const values = sections.flatMap(({ layers }) => chart.series.flatMap(({ valueOf }) => layers.map(valueOf)));
  const ticks = ticksUpTo(Math.max(...values.filter((value) => value !== null)), chart.binary);
  const heightOf = (value) => (CHART_HEIGHT * Math.max(0, value)) / ticks.at(-1);
  const parts = ticks.map((tick) => gridLine(chart.tick(tick), CHART_HEIGHT - heightOf(tick), width));
  let left = AXIS_WIDTH;
  sections.forEach(({ name, layers }, number) => {
    const start = left + (spans[number] - step * layers.length) / 2;
    layers.forEach((layer, index) => parts.push(layerBars(chart, layer, start + index * step, step, heightOf)));
    if (name) parts.push(sectionLabel(name, left + spans[number] / 2));
    left += spans[number] + SECTION_GAP;
  });
  return element(
    "div",
    { class: "chart-scroll" },
    svgElement(
      "svg",
      {
        width,
        height: CHART_HEIGHT + LABEL_HEIGHT + 10,
        viewBox: `0 -10 ${width} ${CHART_HEIGHT + LABEL_HEIGHT + 10}`,
        role: "img",
        "aria-label": `${chart.title} of ${counted(sumOf(sections, ({ layers }) => layers.length), "layer")}`,
      },
      parts,
    ),
  );
}

/** The width of a bar and its space: what is left where the labels of short sections take more than their bars. */
function stepOfBars(sections, room) {
  const shareOf = (section) => (room * section.layers.length) / countBars(sections);
  const wide = sections.filter((section) => labelWidth(section) <= shareOf(section));
  const short = sections.filter((section) => !wide.includes(section));
  const left = room - sumOf(short, labelWidth);
  return Math.max(2, Math.min(WIDEST_BAR, wide.length > 0 ? left / countBars(wide) : WIDEST_BAR));
}

function countBars(sections) {
  return sumOf(sections, (section) => section.layers.length);
}

function labelWidth({ name }) {
  return name.length * LETTER;
}

function spanOf(section, step) {
  return Math.max(step * section.layers.length, labelWidth(section));
}

/** Round numbers from 0 to at least the largest value. */
function ticksUpTo(largest, binary) {
  const rough = largest / 4 || 1;
  const power = binary ? 2 ** Math.ceil(Math.log2(rough)) : 10 ** Math.floor(Math.log10(rough));
  const step = binary ? power : power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  return Array.from({ length: Math.max(1, Math.ceil(largest / step)) + 1 }, (_, index) => index * step);
}

function gridLine(text, y, width) {
  return svgElement(
    "g",
    { class: "grid" },
    svgElement("line", { x1: AXIS_WIDTH, x2: width, y1: y, y2: y }),
    svgElement("text", { x: AXIS_WIDTH - 8, y: y + 4, "text-anchor": "end" }, text),
  );
}

function layerBars(chart, layer, x, step, heightOf) {
  const space = step > 6 ? 2 : step > 3 ? 1 : 0;
  const values = chart.series.map(({ name, valueOf }) => tooltipLine(name, valueOf(layer), chart.format));
  const lines = [layer.fqn, ...values];
  if (layer.skip) lines.push(layer.skip);
  const show = (event) => showTooltip(lines, event.clientX, event.clientY);
  return svgElement(
    "g",
    {
      class: "bars",
      "data-layer": layer.fqn,
      on: {
        mousemove: show,
        mouseleave: () => showTooltip(null),
        click: () => go({ view: "decisions", layer: layer.fqn }),
      },
    },
    svgElement("rect", { class: "bar-space", x, y: 0, width: step, height: CHART_HEIGHT }),
    chart.series.map(({ valueOf }, index) => {
      const value = valueOf(layer);
      const height = value === null ? 3 : Math.max(1, heightOf(value));
      const kind = value === null ? "bar-missing" : barClass(chart.series, index);
      const [left, y, width] = [x + space / 2, CHART_HEIGHT - height, step - space];
      return svgElement("rect", { class: kind, x: left, y, width, height });
    }),
  );
}

function tooltipLine(name, value, format) {
  return `${name}: ${value === null ? "not measured" : format(value)}`;
}

function sectionLabel(name, middle) {
  const place = { x: middle, y: CHART_HEIGHT + 18, "text-anchor": "middle" };
  return svgElement("text", { class: "section-label", ...place }, name);
}
