"""Runs passes over a graph: times, pays fuel, verifies and records, so that no pass has to."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from torch.fx import Node

from mixq_compile.errors import unknown_name
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.changes import Changes, Fingerprint
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.snapshot import Snapshot
from mixq_compile.ir.verify import Violation, verify
from mixq_compile.pipeline.failures import pass_failure, verification_failure
from mixq_compile.pipeline.history import History, PassRecord
from mixq_compile.pipeline.passes import Decision, Pass, PassContext

Verification = Literal["incremental", "full", "off"]
VERIFICATIONS = ("incremental", "full", "off")


def run_passes(
    passes: Sequence[Pass],
    text: str,
    graph: CapturedGraph,
    context: PassContext,
    verification: Verification,
    snapshots: bool,
) -> History:
    """Runs the passes in order. Raises PassError where one fails, PassVerificationError where one errs."""
    if verification not in VERIFICATIONS:
        raise unknown_name("verification", verification, VERIFICATIONS)
    with _collector_paused():
        return _run_all(passes, text, graph, context, verification, snapshots)


def _run_all(
    passes: Sequence[Pass],
    text: str,
    graph: CapturedGraph,
    context: PassContext,
    verification: Verification,
    snapshots: bool,
) -> History:
    current = Snapshot.of(graph) if snapshots else None
    history = History(text, current)
    known = frozenset(verify(graph)) if verification == "full" else frozenset()
    fingerprint = Fingerprint(graph)
    for index, step in enumerate(passes, 1):
        record = _run_pass(index, step, graph, context, history)
        changes = fingerprint.changes(graph)
        _stamp_origin(step, changes)
        fingerprint.accept(graph, changes.created)
        if current is not None and changes:
            after = current.updated(graph, {*changes.created, *changes.changed})
            record = replace(record, diff=GraphDiff.between(current, after))
            current = after
        elif current is not None:
            record = replace(record, diff=GraphDiff())
        violations = _verify(graph, changes, verification, known)
        record = replace(record, violations=tuple(violations))
        history.records.append(record)
        if violations:
            raise verification_failure(graph, violations, record, history)
    graph.module.recompile()
    return history


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Nodes and rows live on, so that collecting finds nothing, and takes a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run_pass(
    index: int, step: Pass, graph: CapturedGraph, context: PassContext, history: History
) -> PassRecord:
    decisions: list[Decision] = []
    stopped = False
    graph.current = None
    started = time.perf_counter()
    try:
        stopped = _decide(step, graph, context, decisions)
    except Exception as error:
        record = PassRecord(index, step.spec(), _milliseconds_since(started), None, tuple(decisions))
        history.records.append(record)
        raise pass_failure(graph, _node_in_hand(graph, decisions), record, history, error) from error
    return PassRecord(
        index, step.spec(), _milliseconds_since(started), None, tuple(decisions), stopped=stopped
    )


def _decide(step: Pass, graph: CapturedGraph, context: PassContext, decisions: list[Decision]) -> bool:
    """Collects a pass's decisions, each before it is acted upon. True if the fuel ended it."""
    steps = step.run(graph, context)
    if not isinstance(steps, Generator):
        raise TypeError(
            f"{type(step).__qualname__}.run must be a generator, which yields each decision before acting "
            f"on it; it returned {type(steps).__name__}."
        )
    for decision in steps:
        if decision.verdict == "applied" and step.spends_fuel and not context.fuel.spend():
            steps.close()
            return True
        decisions.append(decision)
    return False


def _node_in_hand(graph: CapturedGraph, decisions: Sequence[Decision]) -> Node | None:
    if graph.current is not None:
        return graph.current
    name = decisions[-1].node if decisions else None
    return next((node for node in graph.graph.nodes if node.name == name), None)


def _milliseconds_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


def _stamp_origin(step: Pass, changes: Changes) -> None:
    for node in changes.created:
        origin = Annotations(node).origin or []
        if not origin or origin[-1] != step.name:
            Annotations(node).origin = [*origin, step.name]


def _verify(
    graph: CapturedGraph, changes: Changes, verification: Verification, known: frozenset[Violation]
) -> list[Violation]:
    """What the pass broke; findings in the graph as it was captured are not its doing."""
    if verification == "off" or not changes:
        return []
    nodes = None if verification == "full" else changes.touched()
    return [violation for violation in verify(graph, nodes) if violation not in known]
