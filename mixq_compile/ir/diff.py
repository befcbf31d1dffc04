"""What lies between two snapshots, small enough to store and complete enough to apply."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixq_compile.ir.snapshot import NodeRow, Snapshot


@dataclass(frozen=True)
class GraphDiff:
    """The difference of two snapshots; nodes are the same if their names are."""

    added: tuple[NodeRow, ...] = ()
    """Nodes of the second snapshot only, in its order."""
    removed: tuple[NodeRow, ...] = ()
    """Nodes of the first snapshot only, in its order."""
    changed: tuple[tuple[NodeRow, NodeRow], ...] = ()
    """Nodes of both that are not equal: before, after."""
    placed: tuple[tuple[str, str | None], ...] = ()
    """Each added or moved node and the one before it (None: it is the first), in the second's order."""

    @classmethod
    def between(cls, before: Snapshot, after: Snapshot) -> GraphDiff:
        """What turns one snapshot into the other."""
        staying = _longest_common_order(before, after)
        placed = [
            (row.name, after.rows[place - 1].name if place else None)
            for place, row in enumerate(after.rows)
            if row.name not in staying
        ]
        common = [(before.by_name[row.name], row) for row in after.rows if row.name in before.by_name]
        return cls(
            added=tuple(row for row in after.rows if row.name not in before.by_name),
            removed=tuple(row for row in before.rows if row.name not in after.by_name),
            changed=tuple((old, new) for old, new in common if old is not new and old != new),
            placed=tuple(placed),
        )

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.placed)

    @property
    def moved(self) -> tuple[str, ...]:
        """Nodes of both snapshots that stand elsewhere."""
        added = {row.name for row in self.added}
        return tuple(name for name, _ in self.placed if name not in added)

    @property
    def op_counts(self) -> dict[str, int]:
        """By how much the number of calls of each target changed; targets that did not are left out."""
        counts: dict[str, int] = {}
        after = (*self.added, *(new for _, new in self.changed))
        before = (*self.removed, *(old for old, _ in self.changed))
        for rows, step in ((after, 1), (before, -1)):
            for row in rows:
                if row.op.startswith("call"):
                    counts[row.target] = counts.get(row.target, 0) + step
        return {target: count for target, count in counts.items() if count}

    def touched_fqns(self) -> tuple[str, ...]:
        """The modules that this difference touches, in order."""
        rows = (*self.removed, *(new for _, new in self.changed), *self.added)
        return tuple(dict.fromkeys(row.fqn for row in rows if row.fqn))

    def apply(self, before: Snapshot) -> Snapshot:
        """The second snapshot, from the first."""
        leaving = {row.name for row in self.removed} | {name for name, _ in self.placed}
        known = before.by_name | {new.name: new for _, new in self.changed}
        known |= {row.name: row for row in self.added}
        behind = {previous: name for name, previous in self.placed}
        order: list[str] = []
        for start in (None, *(row.name for row in before.rows if row.name not in leaving)):
            name = start
            if name is not None:
                order.append(name)
            while (name := behind.get(name)) is not None:
                order.append(name)
        return Snapshot(tuple(known[name] for name in order))

    def to_json(self) -> dict[str, Any]:
        """The difference as JSON-able data."""
        return {
            "added": [row.to_json() for row in self.added],
            "removed": [row.to_json() for row in self.removed],
            "changed": [[old.to_json(), new.to_json()] for old, new in self.changed],
            "placed": [list(place) for place in self.placed],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GraphDiff:
        """The difference that `to_json` wrote."""
        return cls(
            added=tuple(NodeRow.from_json(row) for row in data["added"]),
            removed=tuple(NodeRow.from_json(row) for row in data["removed"]),
            changed=tuple((NodeRow.from_json(old), NodeRow.from_json(new)) for old, new in data["changed"]),
            placed=tuple((name, previous) for name, previous in data["placed"]),
        )


def _longest_common_order(before: Snapshot, after: Snapshot) -> set[str]:
    """The largest set of nodes of both snapshots that stand in one order in both."""
    place = {row.name: number for number, row in enumerate(before.rows)}
    common = [row.name for row in after.rows if row.name in place]
    return {common[number] for number in _increasing([place[name] for name in common])}


def _increasing(numbers: Sequence[int]) -> list[int]:
    """Positions of a longest increasing subsequence."""
    ends: list[int] = []
    tails: list[int] = []
    previous: list[int] = []
    for position, number in enumerate(numbers):
        length = bisect.bisect_left(tails, number)
        tails[length : length + 1] = [number]
        ends[length : length + 1] = [position]
        previous.append(ends[length - 1] if length else -1)
    chain: list[int] = []
    position = ends[-1] if ends else -1
    while position >= 0:
        chain.append(position)
        position = previous[position]
    return chain
