// Everything that is known about one node, beside the view.

function showCard(model) {
  const card = byId("card");
  const found = state.node !== "" && model.hasSnapshots ? model.rowNear(state.node, state.pass) : null;
  card.hidden = state.node === "";
  if (card.hidden) return;
  const heading = element(
    "header",
    null,
    element("h2", null, element("code", null, state.node)),
    closeButton("card-close", "Close the card", closeCard),
  );
  card.replaceChildren(
    heading,
    ...(found === null
      ? [emptyMessage("No such node", "No node of this graph ever had this name.")]
      : cardParts(model, found.row, found.pass)),
  );
  card.scrollTop = 0;
}

function closeCard() {
  go({ node: "" });
}

function cardParts(model, row, pass) {
  const users = model.snapshot(pass).usersOf(row.name);
  const life = model.lives.get(row.name);
  return [
    pass === state.pass ? null : element("p", { class: "absent-note" }, absenceText(row.name, pass, life)),
    element(
      "dl",
      { class: "card-facts" },
      fact("module", row.fqn ? moduleValue(model, row.fqn) : ABSENT),
      fact("operation", row.op),
      fact("target", element("code", null, row.target)),
      row.value ? fact("value", element("code", null, row.value)) : null,
      row.args ? fact("arguments", element("code", null, argumentTokens(row).map(tokenElement))) : null,
      fact(counted(row.inputs.length, "input"), nodeLinks(row.inputs)),
      fact(counted(users.length, "user"), nodeLinks(users)),
      row.where ? fact("Python", sourceLine(row.where)) : null,
      row.annotations.origin ? fact("origin", originChain(row.annotations.origin)) : null,
      fact("history", life.map(({ pass: index, kind }) => lifeEvent(model, index, kind))),
    ),
    cardDecisions(model, row),
    cardAnnotations(row.annotations),
  ].filter((part) => part !== null);
}

function fact(name, ...value) {
  return element("div", null, element("dt", null, name), element("dd", null, value));
}

function sourceLine(where) {
  const { place, code } = pythonLine(where);
  return [element("span", { title: where }, place), code ? element("code", { class: "source" }, code) : null];
}

function moduleValue(model, fqn) {
  const layer = layerOf(fqn, model.layersByName);
  if (layer === null) return element("code", null, fqn);
  return layerLink(layer, fqn);
}

function argumentTokens(row) {
  const tokens = [];
  addArguments(row, (kind, text, node = null) => tokens.push({ kind, text, node }));
  return tokens;
}

function nodeLinks(names) {
  if (names.length === 0) return ABSENT;
  const shown = names.slice(0, 40).map((name) => element("li", null, nodeLink(name)));
  const hidden = names.length - shown.length;
  const rest = hidden > 0 ? element("li", { class: "quiet" }, `and ${hidden} more`) : null;
  return element("ul", { class: "node-links" }, shown, rest);
}

function originChain(origin) {
  return element("ol", { class: "origin" }, origin.map((name) => element("li", null, name)));
}

function lifeEvent(model, index, kind) {
  const record = model.record(index);
  const text = record === null ? "captured" : `${kind} by ${index} ${splitSpec(record.spec)[0]}`;
  return element(
    "div",
    { class: `life ${kind}` },
    link(text, "Show this pass", () => go({ pass: index, view: record === null ? "program" : "changes" })),
  );
}

/** Why the card shows a node as it was behind another pass. */
function absenceText(name, pass, life) {
  const removal = life.findLast((event) => event.kind === "removed" && event.pass <= state.pass);
  if (removal !== undefined) return `Removed by pass ${removal.pass}; shown as it was before.`;
  return `Not yet there; shown as pass ${pass} creates it.`;
}

function cardDecisions(model, row) {
  const decisions = model.records.flatMap((record) =>
    record.decisions.filter(({ node }) => node === row.name).map((decision) => ({ ...decision, record })),
  );
  if (decisions.length === 0) return null;
  return element(
    "section",
    null,
    element("h3", null, "Decisions"),
    element(
      "ul",
      { class: "card-decisions" },
      decisions.map(({ record, verdict, reason, details }) =>
        element(
          "li",
          null,
          element("span", { class: `verdict ${verdict}` }, verdict),
          passLink(record),
          element("p", null, reason),
          detailsElement(details),
        ),
      ),
    ),
  );
}

function cardAnnotations(annotations) {
  if (Object.keys(annotations).length === 0) return null;
  return element(
    "section",
    null,
    element("h3", null, "Annotations"),
    element("pre", { class: "json" }, JSON.stringify(annotations, null, 2)),
  );
}
