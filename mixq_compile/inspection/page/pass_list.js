// The passes, in order, with the captured graph before them.

let passFilter = "";

/** Makes the parts that stay while passes are chosen and filtered. */
function showPassPanel() {
  const filter = element("input", {
    type: "search",
    id: "pass-filter",
    placeholder: "Filter passes",
    "aria-label": "Filter passes",
    value: passFilter,
    on: {
      input: (event) => {
        passFilter = event.target.value;
        showPasses();
      },
    },
  });
  const hide = element("input", {
    type: "checkbox",
    id: "hide-inconsequential",
    on: {
      change: (event) => {
        rememberTaste({ hideInconsequential: event.target.checked });
        showPasses();
      },
    },
  });
  hide.checked = taste.hideInconsequential;
  byId("passes").replaceChildren(
    element(
      "div",
      { class: "passes-head" },
      filter,
      element(
        "label",
        { class: "check", title: "Passes that changed nothing, found nothing wrong and did not run out of fuel" },
        hide,
        "Hide the inconsequential",
        element("span", { class: "count", id: "hidden-count" }),
      ),
    ),
    element("ol", { class: "pass-list", id: "pass-list" }),
  );
}

function showPasses() {
  const { records } = currentModel();
  const inconsequential = records.filter((record) => !isConsequential(record)).length;
  byId("hidden-count").textContent = String(inconsequential);
  keepingFocus(() => byId("pass-list").replaceChildren(...visiblePasses().map(passItem)));
  byId("pass-list").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
}

function isConsequential(record) {
  return record.diff === null || hasChanges(record.diff) || record.violations.length > 0 || record.stopped;
}

/** Numbers of the passes that the list shows; the chosen one always is. */
function visiblePasses() {
  const words = passFilter.toLowerCase().split(/\s+/);
  const found = currentModel().records.filter(
    (record) =>
      record.index === state.pass ||
      ((isConsequential(record) || !taste.hideInconsequential) &&
        words.every((word) => record.spec.toLowerCase().includes(word))),
  );
  return [0, ...found.map((record) => record.index)];
}

/** Shows a pass, in a view that is about one. */
function choosePass(pass) {
  const aboutAllPasses = state.view === "layers" || state.view === "charts";
  go({ pass, view: aboutAllPasses ? "changes" : state.view });
}

/** Goes so many passes up or down the list. */
function stepPass(step) {
  const passes = visiblePasses();
  const place = passes.indexOf(state.pass) + step;
  if (place >= 0 && place < passes.length) choosePass(passes[place]);
}

function passItem(pass) {
  const record = currentModel().record(pass);
  const [name, options] = record === null ? ["captured", ""] : splitSpec(record.spec);
  const attributes = {
    type: "button",
    class: "pass",
    "data-pass": pass,
    "data-focus": `pass ${pass}`,
    "aria-current": pass === state.pass ? "true" : null,
    title: record === null ? "The graph before the first pass" : record.spec,
    on: { click: () => choosePass(pass) },
  };
  return element(
    "li",
    null,
    element(
      "button",
      attributes,
      element("span", { class: "pass-number" }, pass),
      element("span", { class: "pass-name" }, name),
      element("span", { class: "pass-time" }, record === null ? "" : formatMilliseconds(record.milliseconds)),
      options ? element("span", { class: "pass-options" }, options) : null,
      element("span", { class: "pass-facts" }, record === null ? capturedFacts() : passFacts(record)),
    ),
  );
}

function capturedFacts() {
  const model = currentModel();
  return model.hasSnapshots ? counted(model.snapshot(0).rows.length, "node") : "no snapshots";
}

function passFacts(record) {
  const decisions = ["applied", "skipped"]
    .map((verdict) => [countVerdict(record, verdict), verdict])
    .filter(([number]) => number > 0)
    .map(([number, verdict]) => `${number} ${verdict}`);
  return [
    changeCounts(record.diff),
    decisions.length > 0 ? element("span", { class: "quiet" }, decisions.join(" · ")) : null,
    record.violations.length > 0
      ? element("span", { class: "flag bad" }, counted(record.violations.length, "violation"))
      : null,
    record.stopped ? element("span", { class: "flag" }, "fuel spent") : null,
  ];
}

/** `+4 −1 ~2`, or `=` where nothing changed. */
function changeCounts(difference) {
  if (difference === null) return null;
  const parts = [
    ["added", "+", difference.added.length],
    ["removed", MINUS, difference.removed.length],
    ["changed", "~", difference.changed.length],
  ].filter(([, , number]) => number > 0);
  if (parts.length === 0) return element("span", { class: "quiet" }, "=");
  return element(
    "span",
    { class: "change-counts" },
    parts.map(([kind, sign, number]) => element("span", { class: `ink-${kind}` }, sign + number)),
  );
}

function countVerdict(record, verdict) {
  return record.decisions.filter((decision) => decision.verdict === verdict).length;
}
