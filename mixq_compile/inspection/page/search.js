// Finding nodes, layers and passes by name.

const MOST_RESULTS = 60;
let results = [];
let chosenResult = 0;

function openSearch() {
  const dialog = byId("search");
  if (dialog.open) return;
  const input = element("input", {
    type: "search",
    id: "search-input",
    placeholder: "Nodes, layers, passes",
    "aria-label": "Search",
    role: "combobox",
    "aria-expanded": "true",
    "aria-controls": "search-results",
    autocomplete: "off",
    on: { input: (event) => showResults(event.target.value), keydown: steerSearch },
  });
  dialog.replaceChildren(
    input,
    element("ul", { id: "search-results", role: "listbox", "aria-label": "Results" }),
    element("p", { class: "quiet" }, "↑ ↓ choose · Enter opens · Escape closes"),
  );
  dialog.showModal();
  showResults("");
}

function showResults(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  results = words.length > 0 ? findAll(currentModel(), words) : [];
  chosenResult = 0;
  const list = byId("search-results");
  list.replaceChildren(...results.map(resultElement));
  if (words.length > 0 && results.length === 0) {
    list.append(element("li", { class: "quiet" }, "Nothing is named like this."));
  }
  markChosenResult();
}

/** The best results: {kind, name, aside, open}, shorter names and earlier matches first. */
function findAll(model, words) {
  const candidates = [...passCandidates(model), ...layerCandidates(model), ...nodeCandidates(model)];
  return candidates
    .map((candidate) => ({ ...candidate, rank: rankOf(candidate, words) }))
    .filter(({ rank }) => rank !== null)
    .sort((a, b) => a.rank - b.rank)
    .slice(0, MOST_RESULTS);
}

function passCandidates(model) {
  return model.records.map((record) => ({
    kind: "pass",
    name: record.spec,
    aside: `pass ${record.index}`,
    open: () => go({ pass: record.index, view: "changes" }),
  }));
}

function layerCandidates(model) {
  return model.layers.map((layer) => ({
    kind: "layer",
    name: layer.fqn,
    aside: layer.scheme ?? "left alone",
    open: () => go({ view: "decisions", layer: layer.fqn }),
  }));
}

function nodeCandidates(model) {
  const present = model.hasSnapshots ? model.snapshot(state.pass).byName : new Map();
  return model.everyName.map((name) => ({
    kind: "node",
    name,
    aside: present.has(name) ? present.get(name).target : "not behind this pass",
    open: () => go({ node: name, view: "program", pass: model.rowNear(name, state.pass).pass, layer: "" }),
  }));
}

/** How well a name fits: less is better, null where a word is missing. */
function rankOf({ kind, name }, words) {
  const lowered = name.toLowerCase();
  let rank = ["pass", "layer", "node"].indexOf(kind) * 20 + lowered.length / 10;
  for (const word of words) {
    const place = lowered.indexOf(word);
    if (place < 0) return null;
    rank += lowered === word ? -1000 : place === 0 ? -50 : 0;
  }
  return rank;
}

function resultElement(result, index) {
  return element(
    "li",
    {
      role: "option",
      id: `result-${index}`,
      "aria-selected": "false",
      on: { click: () => openResult(index) },
    },
    element("span", { class: "result-kind" }, result.kind),
    element("code", null, result.name),
    element("span", { class: "quiet" }, result.aside),
  );
}

function steerSearch(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step !== undefined && results.length > 0) {
    chosenResult = (chosenResult + step + results.length) % results.length;
    markChosenResult();
  } else if (event.key === "Enter" && results.length > 0) openResult(chosenResult);
  // In a field for searching, the first Escape would only clear it.
  else if (event.key === "Escape") byId("search").close();
  else return;
  event.preventDefault();
}

function markChosenResult() {
  byId("search-results")
    .querySelectorAll("[role=option]")
    .forEach((option, index) => {
      option.setAttribute("aria-selected", String(index === chosenResult));
      if (index === chosenResult) option.scrollIntoView({ block: "nearest" });
    });
  byId("search-input").setAttribute("aria-activedescendant", results.length > 0 ? `result-${chosenResult}` : "");
}

function openResult(index) {
  byId("search").close();
  results[index].open();
}
