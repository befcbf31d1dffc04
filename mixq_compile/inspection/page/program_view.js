// The whole graph behind the chosen pass, one line a node.

function showProgram(container, model) {
  if (!model.hasSnapshots) {
    container.append(emptyMessage("No snapshots", "This run recorded no graphs; inspect the model to record them."));
    return null;
  }
  const record = model.record(state.pass);
  const { rows } = model.snapshot(state.pass);
  const passes = layerFilter(state.layer, model.layersByName);
  const wanted = rows
    .map((row, index) => ({ row, number: index + 1 }))
    .filter(({ row }) => namesOf(row).some(passes));
  container.append(
    element("div", { class: "view-head" }, programSummary(record, wanted.length, rows.length)),
  );
  if (wanted.length === 0) {
    container.append(emptyMessage("Nothing here", `No node behind this pass lies in ${state.layer}.`));
    return null;
  }
  const kinds = kindsOf(record?.diff ?? null);
  const list = new LineList(container, "Program");
  const draw = () => {
    const columns = list.columns(1, GUTTER);
    list.show(
      wanted,
      ({ row }) => countLines(rowTokens(row), columns),
      ({ row, number }) => programLine(row, number, kinds.get(row.name) ?? "context", columns),
    );
  };
  draw();
  return {
    resized: () => list.redraw(draw),
    revealNode: () => {
      const index = wanted.findIndex(({ row }) => row.name === state.node);
      if (index >= 0) list.reveal(index);
    },
  };
}

function programSummary(record, wanted, all) {
  const number = wanted === all ? counted(all, "node") : `${wanted} of ${counted(all, "node")}`;
  return element(
    "div",
    { class: "pass-summary" },
    element(
      "h2",
      null,
      element("span", { class: "pass-number" }, record?.index ?? 0),
      record === null ? "captured" : `behind ${splitSpec(record.spec)[0]}`,
    ),
    element("span", { class: "quiet" }, number),
  );
}

/** Which nodes the pass has just added or changed. */
function kindsOf(difference) {
  const kinds = new Map();
  if (difference === null) return kinds;
  difference.added.forEach((row) => kinds.set(row.name, "added"));
  difference.changed.forEach(([, row]) => kinds.set(row.name, "changed"));
  return kinds;
}

function programLine(row, number, kind, columns) {
  return element(
    "div",
    { class: `line program ${kind}` },
    gutter(number, SIGNS[kind]),
    codeElement(rowTokens(row), columns),
  );
}
