// Which layers a pass touched, by the rules of the terminal's view, and what a filter for layers means.

const NO_TOUCH = { added: 0, removed: 0, changed: 0, applied: 0, skipped: 0 };

/** The layer that a node's name lies in: itself, or the one that it is a part of; null where there is none. */
function layerOf(fqn, known) {
  for (let name = fqn; name; name = name.slice(0, Math.max(0, name.lastIndexOf(".")))) {
    if (known.has(name)) return name;
  }
  return null;
}

/** The layers that a node names: its own, or all that a product of several stands for. */
function namesOf(row) {
  const members = row.annotations.members;
  return members?.length ? members.map((member) => member.fqn ?? "") : [row.fqn];
}

/** What a pass did to each layer, by its name; layers that it did not touch are left out. */
function touchesOf(record, layersByName) {
  const touches = new Map();
  const count = (kind, fqns) => {
    for (const layer of new Set(fqns.map((fqn) => layerOf(fqn, layersByName)))) {
      if (layer === null) continue;
      if (!touches.has(layer)) touches.set(layer, { ...NO_TOUCH });
      touches.get(layer)[kind] += 1;
    }
  };
  if (record.diff !== null) {
    record.diff.added.forEach((row) => count("added", namesOf(row)));
    record.diff.removed.forEach((row) => count("removed", namesOf(row)));
    record.diff.changed.forEach(([, row]) => count("changed", namesOf(row)));
  }
  for (const { verdict, fqn } of record.decisions) {
    if (verdict === "applied" || verdict === "skipped") count(verdict, [fqn]);
  }
  return touches;
}

/** The touch in a few characters: `+3 −1 ~2`, or `kept` where the pass left the layer alone. */
function markOf(touch) {
  const parts = [
    ["+", touch.added],
    [MINUS, touch.removed],
    ["~", touch.changed],
  ];
  const nodes = parts.filter(([, number]) => number > 0).map(([sign, number]) => sign + number);
  return nodes.join(" ") || (touch.skipped > 0 ? "kept" : "");
}

/**
 * A test for module names: the name of a layer means that layer, a pattern with `*` or `?` every name that
 * it matches and what lies inside, anything else every name that contains it.
 */
function layerFilter(pattern, layersByName) {
  const text = pattern.trim();
  if (text === "") return () => true;
  if (layersByName.has(text)) return (fqn) => fqn === text || fqn.startsWith(`${text}.`);
  if (/[*?]/.test(text)) {
    const source = text.replace(/[.+^${}()|[\]\\]/g, "\\$&").replaceAll("*", ".*").replaceAll("?", ".");
    const expression = new RegExp(`^${source}(\\.|$)`);
    return (fqn) => expression.test(fqn);
  }
  const lowered = text.toLowerCase();
  return (fqn) => fqn.toLowerCase().includes(lowered);
}
