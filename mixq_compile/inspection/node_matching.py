"""Which nodes of two captures stand for each other, and the second graph under the names of the first."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Mapping
from typing import Any

from mixq_compile.ir.snapshot import NodeRow, Snapshot

RADIUS = 3
"""How far around a node its surroundings are looked at."""
SOURCES = ("placeholder", "get_attr")
PROVENANCE = frozenset({"origin", "readers"})
"""Annotations that name passes and nodes of one capture."""
_REFERENCE = re.compile(r"%(\w+)")
_MEASURED_SPEEDUP = re.compile(r"\d+(\.\d+)?x\b")

Keys = Mapping[str, Hashable]
"""By name, what equal nodes have in common."""


def match_nodes(before: Snapshot, after: Snapshot) -> dict[str, str]:
    """The node of `before` that each node of `after` stands for, by name; no node is matched twice.

    Nodes with equal surroundings are matched first, then those with equal smaller ones, down to module
    and operator alone; among equals, in order. Then what a matched pair reads at one place is matched
    where module and type are equal: there an operator was replaced. What is left has no counterpart.
    """
    numbers: dict[Hashable, int] = {}
    surroundings = (_surroundings(before, numbers), _surroundings(after, numbers))
    found: dict[str, str] = {}
    for old_keys, new_keys in zip(*map(reversed, surroundings), strict=True):
        _match_equal(old_keys, new_keys, found)
    for key in (_call, _parameter):
        _match_equal(_keys(before, key), _keys(after, key), found)
    _match_replaced(before, after, found)
    return found


def renamed_like(before: Snapshot, after: Snapshot) -> Snapshot:
    """The second snapshot under the first one's names for matched nodes.

    What is no difference is as in the first: Python lines, the passes that made a node, times that a
    reason quotes, where a graph keeps a parameter. Other nodes keep their names where these are free.
    """
    found = match_nodes(before, after)
    names, taken = dict(found), set(before.by_name)
    for row in after.rows:
        if row.name not in names:
            names[row.name] = _free_name(row.name, taken)
            taken.add(names[row.name])
    return Snapshot(
        tuple(_renamed_row(row, names, before.by_name.get(found.get(row.name, ""))) for row in after.rows)
    )


def without_speedups(reason: str) -> str:
    """A reason without the speedups that it quotes: they are measured, and vary."""
    return _MEASURED_SPEEDUP.sub("", reason)


def _surroundings(snapshot: Snapshot, numbers: dict[Hashable, int]) -> list[dict[str, int]]:
    """By radius, a number for each node that nodes with equal surroundings share (Weisfeiler–Lehman).

    `numbers` are the ones given so far; graphs that are compared share it.
    """

    def number(key: Hashable) -> int:
        return numbers.setdefault(key, len(numbers))

    readers: dict[str, list[str]] = defaultdict(list)
    for row in snapshot.rows:
        for source in row.inputs:
            readers[source].append(row.name)
    levels = [{row.name: number((_identity(row), _form(row))) for row in snapshot.rows}]
    for _ in range(RADIUS):
        inner = levels[-1]
        levels.append(
            {
                row.name: number(
                    (
                        inner[row.name],
                        tuple(inner.get(source) for source in row.inputs),
                        tuple(sorted(inner[reader] for reader in readers[row.name])),
                    )
                )
                for row in snapshot.rows
            }
        )
    return levels


def _identity(row: NodeRow) -> Hashable:
    """What a node is. A parameter is its name and type; where a graph keeps it depends on the capture."""
    return _parameter(row) or _call(row)


def _call(row: NodeRow) -> Hashable:
    return (row.fqn, row.op, row.target)


def _parameter(row: NodeRow) -> Hashable:
    return (row.fqn, row.value) if row.op in SOURCES and row.fqn else None


def _form(row: NodeRow) -> str:
    """The arguments, with the places of inputs for their names."""
    places = {name: f"%{place}" for place, name in enumerate(row.inputs)}
    return _REFERENCE.sub(lambda match: places.get(match[1], match[0]), row.args)


def _keys(snapshot: Snapshot, key: Callable[[NodeRow], Hashable]) -> Keys:
    """The key of each node that has one."""
    found = {row.name: key(row) for row in snapshot.rows}
    return {name: value for name, value in found.items() if value is not None}


def _match_equal(old_keys: Keys, new_keys: Keys, found: dict[str, str]) -> None:
    """Matches nodes that are left over and have equal keys, in order."""
    taken = set(found.values())
    waiting: dict[Hashable, list[str]] = defaultdict(list)
    for name, key in reversed(list(old_keys.items())):
        if name not in taken:
            waiting[key].append(name)
    for name, key in new_keys.items():
        if name not in found and waiting.get(key):
            found[name] = waiting[key].pop()


def _match_replaced(before: Snapshot, after: Snapshot, found: dict[str, str]) -> None:
    """Matches what matched nodes read at the same place, where it is of one module and type."""
    taken = set(found.values())
    pending = list(found.items())
    while pending:
        new_reader, old_reader = pending.pop()
        old_inputs, new_inputs = before.by_name[old_reader].inputs, after.by_name[new_reader].inputs
        for old_name, new_name in zip(old_inputs, new_inputs, strict=False):
            old, new = before.by_name.get(old_name), after.by_name.get(new_name)
            if old is None or new is None or old_name in taken or new_name in found:
                continue
            if (old.fqn, old.value) == (new.fqn, new.value):
                found[new_name] = old_name
                taken.add(old_name)
                pending.append((new_name, old_name))


def _free_name(name: str, taken: Container[str]) -> str:
    while name in taken:
        name += "_b"
    return name


def _renamed_row(row: NodeRow, names: Mapping[str, str], counterpart: NodeRow | None) -> NodeRow:
    inputs = set(row.inputs)

    def reference(match: re.Match[str]) -> str:
        return f"%{names[match[1]]}" if match[1] in inputs and match[1] in names else match[0]

    changes: dict[str, Any] = {
        "name": names[row.name],
        "args": _REFERENCE.sub(reference, row.args),
        "inputs": tuple(names.get(name, name) for name in row.inputs),
    }
    if counterpart is not None:
        changes["where"] = counterpart.where
        if row.op == "output":
            # Its arguments say it; only some captures record it.
            changes["value"] = counterpart.value
        if _parameter(row) is not None and row.fqn == counterpart.fqn:
            changes["target"] = counterpart.target
        if _essential(row.annotations) == _essential(counterpart.annotations):
            changes["annotations"] = counterpart.annotations
    return dataclasses.replace(row, **changes)


def _essential(annotations: Mapping[str, Any]) -> dict[str, Any]:
    """Annotations without provenance and measured times."""
    kept = {name: value for name, value in annotations.items() if name not in PROVENANCE}
    if kept.get("skip"):
        kept["skip"] = without_speedups(kept["skip"])
    if kept.get("members"):
        kept["members"] = [_essential(member) for member in kept["members"]]
    return kept
