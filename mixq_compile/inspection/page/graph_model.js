// One captured graph: its snapshots, made by applying differences as they are asked for.

class Snapshot {
  #users = null;

  constructor(rows) {
    this.rows = rows;
    this.byName = new Map(rows.map((row) => [row.name, row]));
  }

  /** Names of the nodes that read this one. */
  usersOf(name) {
    if (this.#users === null) {
      this.#users = new Map();
      for (const row of this.rows) {
        for (const input of row.inputs) {
          if (!this.#users.has(input)) this.#users.set(input, []);
          this.#users.get(input).push(row.name);
        }
      }
    }
    return this.#users.get(name) ?? [];
  }
}

/** The second snapshot, from the first. */
function applyDifference(before, difference) {
  const leaving = new Set([...difference.removed.map((row) => row.name), ...difference.placed.map(([name]) => name)]);
  const known = new Map(before.byName);
  for (const [, row] of difference.changed) known.set(row.name, row);
  for (const row of difference.added) known.set(row.name, row);
  const behind = new Map(difference.placed.map(([name, previous]) => [previous, name]));
  const rows = [];
  const follow = (start) => {
    for (let name = behind.get(start); name !== undefined; name = behind.get(name)) rows.push(known.get(name));
  };
  follow(null);
  for (const { name } of before.rows) {
    if (leaving.has(name)) continue;
    rows.push(known.get(name));
    follow(name);
  }
  return new Snapshot(rows);
}

class GraphModel {
  #snapshots = [];
  #lives = null;
  #everyName = null;

  constructor(graph, neighbourhoods) {
    this.name = graph.name;
    this.layers = graph.layers;
    this.layersByName = new Map(graph.layers.map((layer) => [layer.fqn, layer]));
    this.records = graph.history.records;
    this.neighbourhoods = neighbourhoods;
    this.hasSnapshots = graph.history.initial !== null;
    if (this.hasSnapshots) this.#snapshots.push(new Snapshot(graph.history.initial));
  }

  /** The graph behind this pass; 0 is the captured graph. */
  snapshot(pass) {
    for (let index = this.#snapshots.length; index <= pass; index += 1) {
      const difference = this.differenceOf(index);
      const before = this.#snapshots[index - 1];
      this.#snapshots.push(hasChanges(difference) ? applyDifference(before, difference) : before);
    }
    return this.#snapshots[pass];
  }

  /** What a pass did; null for the captured graph. */
  record(pass) {
    return pass > 0 ? this.records[pass - 1] : null;
  }

  differenceOf(pass) {
    return this.record(pass)?.diff ?? null;
  }

  /** Every node that ever was, by name: what became of it, pass by pass. */
  get lives() {
    if (this.#lives === null) this.#lives = this.#readLives();
    return this.#lives;
  }

  /** Names of all nodes that ever were, in the order in which they appeared. */
  get everyName() {
    this.#everyName ??= [...this.lives.keys()];
    return this.#everyName;
  }

  /** The node behind a pass, or as it last was, or as it will first be; null for a name that never was. */
  rowNear(name, pass) {
    const life = this.lives.get(name);
    if (life === undefined) return null;
    const present = this.snapshot(pass).byName.get(name);
    if (present !== undefined) return { row: present, pass };
    const earlier = life.filter((event) => event.pass <= pass);
    const event = earlier.at(-1) ?? life[0];
    const nearest = event.kind === "removed" ? event.pass - 1 : event.pass;
    return { row: this.snapshot(nearest).byName.get(name), pass: nearest };
  }

  #readLives() {
    const lives = new Map();
    const note = (row, pass, kind) => {
      if (!lives.has(row.name)) lives.set(row.name, []);
      lives.get(row.name).push({ pass, kind });
    };
    if (!this.hasSnapshots) return lives;
    for (const row of this.snapshot(0).rows) note(row, 0, "captured");
    for (const record of this.records) {
      if (record.diff === null) continue;
      for (const row of record.diff.added) note(row, record.index, "created");
      for (const [, row] of record.diff.changed) note(row, record.index, "changed");
      for (const row of record.diff.removed) note(row, record.index, "removed");
    }
    return lives;
  }
}

function hasChanges(difference) {
  return difference !== null && Object.values(difference).some((part) => part.length > 0);
}

/** By how much the number of calls of each target changed, most frequent first. */
function operatorCounts(difference) {
  const counts = new Map();
  const count = (row, step) => {
    if (row.op.startsWith("call")) counts.set(row.target, (counts.get(row.target) ?? 0) + step);
  };
  difference.added.forEach((row) => count(row, 1));
  difference.removed.forEach((row) => count(row, -1));
  difference.changed.forEach(([old, row]) => {
    count(old, -1);
    count(row, 1);
  });
  return [...counts].filter(([, step]) => step !== 0).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
}
