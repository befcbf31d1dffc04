// What a pass did, as a sequence of entries, and those entries as the lines of a patch.

const CONTEXT = 3;

/** Both graphs as one sequence: {kind, row, old, number}; what was removed stands where it stood. */
function mergedEntries(before, after, difference) {
  const added = new Set(difference.added.map((row) => row.name));
  const removed = new Set(difference.removed.map((row) => row.name));
  const old = new Map(difference.changed.map(([earlier, row]) => [row.name, earlier]));
  const placed = new Set(difference.placed.map(([name]) => name));
  const entries = [];
  let position = 0;
  // What left comes before what came; a node that moved is shown where it stands now.
  const takeRemoved = () => {
    for (; position < before.rows.length; position += 1) {
      const row = before.rows[position];
      if (removed.has(row.name)) entries.push({ kind: "removed", row, old: null, number: position + 1 });
      else if (!placed.has(row.name)) break;
    }
  };
  takeRemoved();
  after.rows.forEach((row, index) => {
    const kind = added.has(row.name)
      ? "added"
      : old.has(row.name)
        ? "changed"
        : placed.has(row.name)
          ? "moved"
          : "context";
    entries.push({ kind, row, old: old.get(row.name) ?? null, number: index + 1 });
    if (!placed.has(row.name)) {
      position += 1;
      takeRemoved();
    }
  });
  return entries;
}

/** The entries that a patch shows, with gaps between them: {gap, from, entries} stands for hidden ones. */
function withGaps(entries, isWanted, opened) {
  const near = new Uint8Array(entries.length);
  const wanted = entries.map((entry) => entry.kind !== "context" && isWanted(entry));
  wanted.forEach((isChange, index) => {
    if (isChange) near.fill(1, Math.max(0, index - CONTEXT), index + CONTEXT + 1);
  });
  // A change that is not wanted is no context either.
  entries.forEach((entry, index) => {
    if (entry.kind !== "context" && !wanted[index]) near[index] = 0;
  });
  const items = [];
  for (let index = 0; index < entries.length; ) {
    let end = index;
    while (end < entries.length && near[end] === near[index]) end += 1;
    const run = entries.slice(index, end);
    if (near[index] || opened.has(index)) items.push(...run);
    else items.push({ kind: "gap", from: index, hidden: run, next: entries[end]?.row ?? null });
    index = end;
  }
  return items;
}

/** One item a line: changed nodes whose text differs become two lines. */
function unifiedItems(items) {
  return items.flatMap((item) => {
    if (item.kind === "gap") return [item];
    const lines = item.kind === "changed" && !sameText(item) ? [oldLine(item), newLine(item)] : [wholeLine(item)];
    return [...lines.map((line) => ({ kind: "line", sides: [line] })), ...noteItems(item)];
  });
}

/** Old lines on the left, new ones on the right; what was removed stands beside what was added. */
function sideBySideItems(items) {
  const found = [];
  let [left, right] = [[], []];
  const pair = (before, after) => found.push({ kind: "pair", sides: [before, after] });
  const flush = () => {
    for (let index = 0; index < Math.max(left.length, right.length); index += 1) {
      pair(left[index] ?? null, right[index] ?? null);
    }
    [left, right] = [[], []];
  };
  for (const item of items) {
    if (item.kind === "removed") left.push(wholeLine(item));
    else if (item.kind === "added") right.push(wholeLine(item));
    else {
      flush();
      if (item.kind === "gap") found.push(item);
      else if (item.kind === "changed" && !sameText(item)) pair(oldLine(item), newLine(item));
      else pair(wholeLine(item), wholeLine(item));
      found.push(...noteItems(item));
    }
  }
  flush();
  return found;
}

// A line to draw is {kind, row, number, other}; `other` is what its text is compared with.

function wholeLine({ kind, row, number }) {
  return { kind, row, number, other: null };
}

function oldLine({ row, old }) {
  return { kind: "removed", row: old, number: "", other: row };
}

function newLine({ row, old, number }) {
  return { kind: "added", row, number, other: old };
}

function tokensOfLine({ row, other }) {
  return other === null ? rowTokens(row) : markDifferences(rowTokens(row), rowTokens(other))[0];
}

function sameText({ old, row }) {
  return textOfTokens(rowTokens(old)) === textOfTokens(rowTokens(row));
}

/** What changed of a node beside its line: its annotations, its module. */
function noteItems({ old, row }) {
  if (!old) return [];
  const tokens = noteTokens(old, row);
  return tokens.length > 0 ? [{ kind: "note", row, tokens }] : [];
}

function noteTokens(old, row) {
  const tokens = [];
  const add = (kind, text) => tokens.push({ kind, text, node: null });
  const names = new Set([...Object.keys(old.annotations), ...Object.keys(row.annotations)]);
  const compare = (name, before, after) => {
    const [left, right] = [before, after].map((value) => (value === undefined ? null : compactJson(value, 70)));
    if (left === right) return;
    if (tokens.length > 0) add("plain", "  ");
    add("note-name", `${name} `);
    if (left !== null) add("note-old", left);
    if (left !== null) add("plain", " → ");
    add(right === null ? "plain" : "note-new", right ?? "nothing");
  };
  // A line shows the scheme by itself.
  names.delete("scheme");
  for (const name of names) compare(name, old.annotations[name], row.annotations[name]);
  if (!names.has("fqn")) compare("module", old.fqn, row.fqn);
  return tokens;
}
