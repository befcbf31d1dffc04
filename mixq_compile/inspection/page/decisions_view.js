// What was decided and why: by the chosen pass, or by all passes about the chosen layer.

const VERDICTS = ["applied", "skipped", "noted"];
const PORTION = 300;
const openedDecisions = new Set();
let verdictFilter = "all";

function showDecisions(container, model) {
  const explains = state.layer !== "";
  const passes = layerFilter(state.layer, model.layersByName);
  const records = explains ? model.records : model.records.filter((record) => record.index === state.pass);
  const found = records.flatMap((record) =>
    record.decisions.filter((decision) => passes(decision.fqn)).map((decision) => ({ ...decision, record })),
  );
  container.append(element("div", { class: "view-head" }, decisionsHead(model, explains, found)));
  const layer = model.layersByName.get(state.layer);
  if (layer !== undefined) container.append(layerFacts(layer));
  const shown = found.filter((decision) => verdictFilter === "all" || decision.verdict === verdictFilter);
  if (shown.length === 0) {
    container.append(emptyMessage("No decisions", noDecisionsText(explains, found.length)));
    return null;
  }
  const columns = { pass: explains, layer: layer === undefined };
  container.append(decisionTable(alikeDecisions(shown), columns));
  return null;
}

function noDecisionsText(explains, others) {
  if (others > 0) return `None was ${verdictFilter}.`;
  if (explains) return `No pass decided anything about ${state.layer}.`;
  return state.pass === 0 ? "Nothing is decided before the first pass: choose one." : "This pass decided nothing.";
}

function decisionsHead(model, explains, found) {
  const numbers = VERDICTS.map((verdict) => found.filter((decision) => decision.verdict === verdict).length);
  const choices = [
    ["all", `All ${found.length}`, "Every decision"],
    ...VERDICTS.map((verdict, index) => [verdict, `${verdict} ${numbers[index]}`, `Only what was ${verdict}`]),
  ];
  const choose = (verdict) => {
    verdictFilter = verdict;
    showView({ keepsPlace: false });
  };
  const record = model.record(state.pass);
  return [
    explains
      ? element(
          "div",
          { class: "pass-summary" },
          element("h2", null, element("code", null, state.layer)),
          element("span", { class: "quiet" }, "all passes, in order"),
        )
      : record === null
        ? element("div", { class: "pass-summary" }, element("h2", null, "captured"))
        : passSummary(record),
    segmented("Verdict", choices, verdictFilter, choose),
  ];
}

/** What became of a layer, in a few facts. */
function layerFacts(layer) {
  const facts = [
    ["became", layer.scheme ?? "left as it was"],
    layer.skip && ["because", layer.skip],
    layer.kernel && ["kernel", layer.kernel],
    layer.out_features > 0 && ["shape", `${layer.out_features}×${layer.in_features} ${layer.dtype}`],
    layer.bytes_before > 0 && ["weight", beforeAfter(layer.bytes_before, layer.bytes_after, formatBytes)],
    layer.capacity > 0 && ["outlier columns", showOutliers([layer])],
    ["SQNR", layer.sqnr_db === null ? "not measured" : `${layer.sqnr_db.toFixed(1)} dB`],
    layer.weights_db != null && ["SQNR of weights", `${layer.weights_db.toFixed(1)} dB`],
    layer.inputs_db != null && ["SQNR of inputs", `${layer.inputs_db.toFixed(1)} dB`],
    layer.left_out > 0 && ["outlier columns left out", String(layer.left_out)],
    layer.where && ["Python", pythonPlace(layer.where)],
  ];
  return element(
    "dl",
    { class: "facts" },
    facts
      .filter(Boolean)
      .map(([name, value]) => element("div", null, element("dt", null, name), element("dd", null, value))),
  );
}

function pythonPlace(where) {
  const { place, code } = pythonLine(where);
  return element("span", { class: "python", title: where }, place, code ? element("code", null, code) : null);
}

/** Decisions with one verdict, reason and details, about layers whose names differ in numbers only, together. */
function alikeDecisions(decisions) {
  const groups = new Map();
  for (const decision of decisions) {
    const { record, verdict, reason, fqn, details } = decision;
    const texts = [reason, JSON.stringify(details)].map(numberlessNames);
    const key = JSON.stringify([record.index, verdict, numberless(fqn), ...texts]);
    if (!groups.has(key)) groups.set(key, { key, decisions: [] });
    groups.get(key).decisions.push(decision);
  }
  return [...groups.values()];
}

/** A text without the numbers in dotted names; other numbers tell decisions apart. */
function numberlessNames(text) {
  return text.replace(/(?<=[a-z_]\.)\d+(?=\.)/gi, "*");
}

/** The table of decisions; `columns` says whether it names the pass and the layer of each. */
function decisionTable(groups, columns) {
  const headings = [columns.pass && "pass", "verdict", columns.layer && "layer", "reason", "node", "Python line"];
  const body = element("tbody");
  const table = element(
    "table",
    { class: "decisions", "aria-label": "Decisions" },
    element(
      "thead",
      null,
      element("tr", null, headings.filter(Boolean).map((text) => element("th", { scope: "col" }, text))),
    ),
    body,
  );
  const more = element("button", { type: "button", class: "action more" });
  const rows = groups.flatMap((group) => decisionRows(group, columns));
  const showMore = () => {
    body.append(...rows.splice(0, PORTION).map((makeRow) => makeRow()));
    more.textContent = `Show ${Math.min(PORTION, rows.length)} of ${rows.length} more`;
    more.hidden = rows.length === 0;
  };
  more.addEventListener("click", showMore);
  showMore();
  return element("div", { class: "decision-list" }, table, more);
}

/** Functions that make the rows of a group; long lists are made in portions. */
function decisionRows(group, columns) {
  const { key, decisions } = group;
  if (decisions.length === 1) return [() => decisionRow(decisions[0], columns, null)];
  const opened = openedDecisions.has(key);
  const toggle = () => {
    if (opened) openedDecisions.delete(key);
    else openedDecisions.add(key);
    showView({ keepsPlace: true });
  };
  const first = () => decisionRow(decisions[0], columns, { number: decisions.length, opened, toggle });
  return opened ? [first, ...decisions.map((decision) => () => decisionRow(decision, columns, null))] : [first];
}

function decisionRow(decision, columns, group) {
  const { record, verdict, fqn, reason, details, node, where } = decision;
  const name = group === null ? fqn : numberless(fqn);
  const chosen = columns.pass && record.index === state.pass;
  return element(
    "tr",
    { class: `${chosen ? "current" : ""}${group?.opened ? " group" : ""}` },
    columns.pass ? element("td", { class: "pass-link" }, passLink(record)) : null,
    element("td", null, element("span", { class: `verdict ${verdict}` }, verdict)),
    columns.layer ? layerCell(name, group) : null,
    element("td", { class: "reason" }, group === null ? reason : numberlessNames(reason), detailsElement(details)),
    element("td", { class: "node-name" }, node ? (group === null ? nodeLink(node) : `${node}, …`) : ABSENT),
    element("td", { class: "where" }, where ? pythonPlace(where) : ABSENT),
  );
}

function layerCell(name, group) {
  return element(
    "td",
    { class: "layer" },
    group === null ? null : expanderButton(`decisions about ${name}`, group.opened, group.toggle),
    name ? layerLink(name) : ABSENT,
    group === null ? null : element("span", { class: "times" }, `×${group.number}`),
  );
}

function detailsElement(details) {
  const entries = Object.entries(details);
  if (entries.length === 0) return null;
  return element(
    "dl",
    { class: "details" },
    entries.map(([name, value]) =>
      element("div", null, element("dt", null, name), element("dd", null, detailText(value))),
    ),
  );
}

/** A detail as a reader would write it: lists and named parts in one line. */
function detailText(value) {
  if (Array.isArray(value)) return value.map(detailText).join(", ");
  if (value === null || typeof value !== "object") return String(value);
  return Object.entries(value)
    .map(([name, part]) => `${name}: ${detailText(part)}`)
    .join("; ");
}
