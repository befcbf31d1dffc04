"""What a run does beside running its passes: observers, which see the graph behind each of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from mixq_compile.errors import unknown_name
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.changes import Changes
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.snapshot import Snapshot
from mixq_compile.ir.verify import Violation, verify
from mixq_compile.pipeline.facts import fact_named
from mixq_compile.pipeline.history import History, PassRecord
from mixq_compile.pipeline.passes import Pass

Verification = Literal["incremental", "full", "off"]
VERIFICATIONS = ("incremental", "full", "off")


@dataclass(frozen=True)
class Ran:
    """A pass that has just run, and what it changed."""

    graph: CapturedGraph
    step: Pass
    changes: Changes


class Observer(Protocol):
    """Sees the graph before the first pass and behind each one."""

    def before(self, graph: CapturedGraph, history: History) -> None:
        """Looks at the captured graph."""

    def behind(self, ran: Ran, record: PassRecord) -> PassRecord:
        """Looks at the graph behind a pass; returns its record with what it adds to it."""


def observers_for(verification: Verification, snapshots: bool) -> list[Observer]:
    """The observers of a run, in order. Raises OptionError for an unknown verification."""
    if verification not in VERIFICATIONS:
        raise unknown_name("verification", verification, VERIFICATIONS)
    observers: list[Observer] = [Origins()]
    if snapshots:
        observers.append(Snapshots())
    if verification != "off":
        observers.append(Verifier(verification))
    if verification == "full":
        observers.append(Facts())
    return observers


class Origins:
    """Notes on each new node the pass that made it."""

    def before(self, graph: CapturedGraph, history: History) -> None:
        """Nothing: no pass made the captured nodes."""

    def behind(self, ran: Ran, record: PassRecord) -> PassRecord:
        """Adds the pass to the origin of what it made."""
        for node in ran.changes.created:
            origin = Annotations(node).origin or []
            if not origin or origin[-1] != ran.step.name:
                Annotations(node).origin = [*origin, ran.step.name]
        return record


class Snapshots:
    """Records the captured graph, and how each pass changed it."""

    _current: Snapshot

    def before(self, graph: CapturedGraph, history: History) -> None:
        """Takes the snapshot that all differences start from."""
        self._current = history.initial = Snapshot.of(graph)

    def behind(self, ran: Ran, record: PassRecord) -> PassRecord:
        """The record with its difference."""
        if not ran.changes:
            return replace(record, diff=GraphDiff())
        after = self._current.updated(ran.graph, {*ran.changes.created, *ran.changes.changed})
        record = replace(record, diff=GraphDiff.between(self._current, after))
        self._current = after
        return record


class Verifier:
    """Checks what each pass touched, or everything behind each pass."""

    def __init__(self, verification: Verification) -> None:
        """A verifier of one of the kinds that verify anything."""
        self._everything = verification == "full"
        self._known: frozenset[Violation] = frozenset()

    def before(self, graph: CapturedGraph, history: History) -> None:
        """Remembers the findings in the captured graph: they are no pass's doing."""
        self._known = frozenset(verify(graph)) if self._everything else frozenset()

    def behind(self, ran: Ran, record: PassRecord) -> PassRecord:
        """The record with what the pass broke."""
        if not ran.changes:
            return record
        found = verify(ran.graph, None if self._everything else ran.changes.touched())
        broken = tuple(violation for violation in found if violation not in self._known)
        return replace(record, violations=record.violations + broken)


class Facts:
    """Checks each fact where a pass claims to establish it, and behind every later pass while it is held."""

    def __init__(self) -> None:
        """No fact is held yet."""
        self._held: dict[str, str] = {}
        self._fuel_left = True

    def before(self, graph: CapturedGraph, history: History) -> None:
        """Nothing: a captured graph claims no facts."""

    def behind(self, ran: Ran, record: PassRecord) -> PassRecord:
        """The record with a violation for each node that a fact does not hold for.

        From where the fuel ends, passes are cut short and establish nothing.
        """
        step = ran.step
        self._fuel_left = self._fuel_left and not record.stopped
        claimed = step.establishes if self._fuel_left else frozenset()
        held = {name: by for name, by in self._held.items() if name not in step.invalidates | claimed}
        self._held = held | dict.fromkeys(sorted(claimed), f"pass {record.index}, {step.name},")
        if record.violations:
            return record  # predicates read graphs that hold
        found: list[Violation] = []
        for name in claimed:
            found += _breaches(ran.graph, name, f"{step.name} establishes it, and it is not so")
        for name, by in held.items() if ran.changes else ():
            claim = f"{by} established it, and {step.name} neither keeps nor invalidates it"
            found += _breaches(ran.graph, name, claim)
        return replace(record, violations=tuple(found))


def _breaches(graph: CapturedGraph, name: str, claim: str) -> list[Violation]:
    fact = fact_named(name)
    return [
        Violation(node.name, f"the fact {name!r} ({fact.meaning}): {claim}: {why}.")
        for node, why in fact.breaches(graph)
    ]
