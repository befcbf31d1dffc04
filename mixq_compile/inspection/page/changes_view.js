// What the chosen pass changed, as a patch.

const GUTTER = 88;
const CONTEXT_LINES = 2;
const SIGNS = { added: "+", removed: MINUS, changed: "~", moved: "↕", context: "" };

function showChanges(container, model) {
  const record = model.record(state.pass);
  if (!model.hasSnapshots) {
    container.append(emptyMessage("No snapshots", "This run recorded no graphs; inspect the model to record them."));
    return null;
  }
  if (record === null) return showProgram(container, model);
  const head = element("div", { class: "view-head" }, passSummary(record));
  container.append(head);
  if (!hasChanges(record.diff)) {
    container.append(emptyMessage("This pass changed nothing", decisionsOf(record)), allPasses(model));
    return null;
  }
  const entries = mergedEntries(model.snapshot(state.pass - 1), model.snapshot(state.pass), record.diff);
  const passes = layerFilter(state.layer, model.layersByName);
  const isWanted = (entry) => namesOf(entry.row).some(passes) || (entry.old !== null && passes(entry.old.fqn));
  if (!entries.some((entry) => entry.kind !== "context" && isWanted(entry))) {
    container.append(emptyMessage("Nothing here", `This pass changed nothing in ${state.layer}.`), allPasses(model));
    return null;
  }
  head.append(
    segmented(
      "Form of the patch",
      [
        [false, "Unified", "One below the other (t)"],
        [true, "Side by side", "Before and after beside each other (t)"],
      ],
      taste.split,
      setSplit,
    ),
  );
  return patchList(container, entries, isWanted);
}

/** What every pass did to the layers in sight, for where the chosen one did nothing; a click goes there. */
function allPasses(model) {
  const passes = layerFilter(state.layer, model.layersByName);
  const items = model.records.map((record) => {
    const number = changesIn(record, passes);
    const [name] = splitSpec(record.spec);
    const text = number > 0 ? counted(number, "change") : "nothing";
    return element(
      "li",
      { class: number > 0 ? "" : "quiet" },
      element(
        "button",
        { type: "button", class: "link", on: { click: () => go({ pass: record.index }) } },
        `${record.index} ${name}`,
      ),
      ` ${text}`,
    );
  });
  return element("ol", { class: "all-passes", "aria-label": "What each pass changed" }, items);
}

function changesIn({ diff }, passes) {
  if (diff === null) return 0;
  const rows = [...diff.added, ...diff.removed, ...diff.changed.map(([, row]) => row)];
  return rows.filter((row) => namesOf(row).some(passes)).length;
}

/** Changes the form of the patch; the node at the top stays there. */
function setSplit(split) {
  rememberTaste({ split });
  if (state.view !== "changes") return;
  const row = byId("view").scrollTop > 0 ? (shownView?.topRow?.() ?? null) : null;
  showView({ keepsPlace: true });
  if (row !== null) shownView.scrollToRow(row);
}

function decisionsOf(record) {
  const number = record.decisions.length;
  return number > 0 ? `It made ${counted(number, "decision")}: see Decisions.` : "It made no decisions either.";
}

function patchList(container, entries, isWanted) {
  const list = new LineList(container, "Changes of the pass");
  const opened = new Set();
  let items = [];
  const draw = () => {
    const columns = list.columns(taste.split ? 0.5 : 1, GUTTER);
    const shown = withGaps(entries, isWanted, opened);
    items = taste.split ? sideBySideItems(shown) : unifiedItems(shown);
    list.show(
      items,
      (item) => linesOfItem(item, columns),
      (item) => itemElement(item, columns, open),
    );
  };
  const open = (gap) => {
    opened.add(gap.from);
    const place = container.scrollTop;
    draw();
    container.scrollTop = place;
  };
  const rowsOf = (item) => (item.sides ?? []).filter((side) => side !== null).map((side) => side.row);
  draw();
  return {
    resized: () => list.redraw(draw),
    topRow: () => rowsOf(items.slice(list.topIndex).find((item) => rowsOf(item).length > 0) ?? {})[0],
    scrollToRow: (row) => list.scrollTo(items.findIndex((item) => rowsOf(item).includes(row))),
    revealNode: () => {
      const index = items.findLastIndex((item) => rowsOf(item).some((row) => row.name === state.node));
      if (index >= 0) list.reveal(index);
    },
  };
}

function linesOfItem(item, columns) {
  if (item.kind === "gap") return 1.5;
  if (item.kind === "note") return countLines(item.tokens, noteColumns(columns));
  return Math.max(...item.sides.map((side) => linesOfSide(side, columns)));
}

function linesOfSide(side, columns) {
  if (side === null) return 1;
  const lines = countLines(rowTokens(side.row), columns);
  return side.kind === "context" ? Math.min(lines, CONTEXT_LINES) : lines;
}

/** A note runs over both halves. */
function noteColumns(columns) {
  return taste.split ? 2 * columns : columns;
}

function itemElement(item, columns, open) {
  if (item.kind === "gap") return gapElement(item, open);
  if (item.kind === "note") {
    return element("div", { class: "line note" }, gutter("", ""), codeElement(item.tokens, noteColumns(columns)));
  }
  const halves = item.sides.map((side) => lineElement(side, columns));
  return item.kind === "pair" ? element("div", { class: "pair" }, halves) : halves[0];
}

function lineElement(side, columns) {
  if (side === null) return element("div", { class: "line void" });
  const { kind, number } = side;
  return element(
    "div",
    { class: `line ${kind}` },
    gutter(number, SIGNS[kind]),
    codeElement(tokensOfLine(side), columns, kind === "context" ? CONTEXT_LINES : Infinity),
  );
}

function gutter(number, sign) {
  return [
    element("span", { class: "line-number", "aria-hidden": "true" }, number),
    element("span", { class: "line-sign" }, sign),
  ];
}

function gapElement(gap, open) {
  const changed = gap.hidden.filter((entry) => entry.kind !== "context").length;
  const unchanged = gap.hidden.length - changed;
  const parts = [
    unchanged > 0 ? counted(unchanged, "unchanged node") : null,
    changed > 0 ? `${counted(changed, "change")} in other layers` : null,
  ];
  const text = parts.filter((part) => part !== null).join(", ");
  return element(
    "div",
    { class: "line-gap" },
    element("button", { type: "button", title: "Show these nodes", on: { click: () => open(gap) } }, `⋯ ${text}`),
    gap.next?.fqn ? element("span", { class: "gap-module" }, gap.next.fqn) : null,
  );
}
