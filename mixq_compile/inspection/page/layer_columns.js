// The columns of the matrix of layers.
//
// A column is {key, title, hint, kind, valueOf, show, total}: `valueOf` gives what one layer is sorted by,
// `show` the cell of layers alike, `total` the cell of all layers. A pass's column has `pass` and its
// `place` among the passes instead.

const COST_ROWS = ["1", "256", "2048"];

function layerColumns(model, layers) {
  const quantities = [
    schemeColumn(layers),
    errorColumn(),
    partColumn(layers, "weights_db", "of weights", "SQNR with only the weight rounded"),
    partColumn(layers, "inputs_db", "of inputs", "SQNR with only the input rounded"),
    outlierColumn(layers),
    bytesColumn(),
    shapeColumn(),
    kernelColumn(),
    bitsColumn(),
    ...COST_ROWS.filter((rows) => layers.some((layer) => layer.costs[rows])).map(costColumn),
    areaColumn(layers),
  ];
  const shown = quantities.filter((column) => column !== null);
  return taste.foldPasses ? shown : [...shown, ...passColumns(model)];
}

function passColumns(model) {
  return touchingPasses(model).map((record, place) => ({
    key: `pass ${record.index}`,
    title: `${record.index} ${splitSpec(record.spec)[0]}`,
    hint: record.spec,
    kind: "by-pass",
    pass: record.index,
    place,
  }));
}

function schemeColumn(layers) {
  const leftAlone = layers.some((layer) => layer.scheme === null);
  return {
    key: "scheme",
    title: leftAlone ? "scheme, or why left alone" : "scheme",
    kind: leftAlone ? "reason" : "text",
    // Layers that were left alone come behind all schemes.
    valueOf: (layer) => layer.scheme ?? `~${layer.skip}`,
    show: shared((layer) => layer.scheme ?? element("span", { class: "kept" }, layer.skip ?? ABSENT)),
  };
}

function kernelColumn() {
  return {
    key: "kernel",
    title: "kernel",
    kind: "text",
    valueOf: (layer) => layer.kernel ?? "",
    show: shared((layer) => layer.kernel ?? ABSENT),
  };
}

function bitsColumn() {
  return {
    key: "bits",
    title: "bits",
    hint: "Bits of weights and of activations",
    kind: "number",
    valueOf: (layer) => layer.weight_bits,
    show: shared((layer) => `${layer.weight_bits}·${layer.activation_bits}`),
  };
}

function shapeColumn() {
  return {
    key: "shape",
    title: "shape",
    hint: "Outputs × inputs",
    kind: "number",
    valueOf: (layer) => layer.out_features * layer.in_features,
    show: shared((layer) => (layer.out_features ? `${layer.out_features}×${layer.in_features}` : "unknown")),
  };
}

function outlierColumn(layers) {
  if (layers.every((layer) => layer.capacity === 0)) return null;
  return {
    key: "outliers",
    title: "outliers",
    hint: "Outlier columns found while running, of the most there may be",
    kind: "number",
    valueOf: (layer) => layer.found_columns,
    show: showOutliers,
  };
}

function errorColumn() {
  const valueOf = (layer) => layer.sqnr_db;
  return {
    key: "sqnr",
    title: "SQNR dB",
    hint: "Signal to quantization noise of the layer's own output: more is better",
    kind: "number",
    valueOf,
    show: (layers) => rangeOf(layers, valueOf, (value) => value.toFixed(1)),
  };
}

/** One part of a layer's error: the lower SQNR of the two makes most of it. */
function partColumn(layers, field, title, hint) {
  const valueOf = (layer) => layer[field] ?? null;
  if (layers.every((layer) => valueOf(layer) === null)) return null;
  return {
    key: field,
    title,
    hint,
    kind: "number",
    valueOf,
    show: (shown) => rangeOf(shown, valueOf, (value) => value.toFixed(1)),
  };
}

function bytesColumn() {
  const show = (layers) =>
    beforeAfter(
      sumOf(layers, (layer) => layer.bytes_before),
      sumOf(layers, (layer) => layer.bytes_after),
      formatBytes,
    );
  return {
    key: "bytes",
    title: "bytes",
    hint: "Of one layer's weight, before and after",
    kind: "number",
    valueOf: (layer) => layer.bytes_after,
    show: ([layer]) => show([layer]),
    total: show,
  };
}

function costColumn(rows) {
  const timeOf = (layers, moment) => sumOf(layers, (layer) => layer.costs[rows]?.microseconds[moment] ?? 0);
  const show = (layers) => beforeAfter(timeOf(layers, "before"), timeOf(layers, "after"), formatMicroseconds);
  return {
    key: `cost ${rows}`,
    title: `time, M = ${rows}`,
    hint: `Expected time of one product with ${counted(Number(rows), "row")}, before and after, by a roofline`,
    kind: "number",
    valueOf: (layer) => layer.costs[rows]?.microseconds.after ?? null,
    show: ([layer]) => (layer.costs[rows] ? show([layer]) : ABSENT),
    total: show,
  };
}

function areaColumn(layers) {
  const valueOf = (layer) => layer.area;
  if (layers.every((layer) => valueOf(layer) === null)) return null;
  return {
    key: "area",
    title: "area",
    hint: "Estimated circuit area in NAND2 equivalents: 16 lanes, stages beside the product folded",
    kind: "number",
    valueOf,
    show: (group) => rangeOf(group, valueOf, significant),
  };
}

/** The cell of a quantity that layers alike have in common. */
function shared(textOf) {
  return ([layer]) => textOf(layer);
}

function showOutliers(layers) {
  const capacity = layers[0].capacity;
  if (capacity === 0) return ABSENT;
  return `${rangeOf(layers, (layer) => layer.found_columns, String)} / ${capacity}`;
}

/** `3`, or `1–7` where layers differ; a dash where nothing was measured. */
function rangeOf(layers, valueOf, format) {
  const values = layers.map(valueOf).filter((value) => value !== null);
  if (values.length === 0) return ABSENT;
  const [least, most] = [Math.min(...values), Math.max(...values)].map(format);
  return least === most ? least : `${least}–${most}`;
}

function beforeAfter(before, after, format) {
  if (before === after) return format(before);
  return [element("span", { class: "before" }, `${format(before)} → `), format(after)];
}
