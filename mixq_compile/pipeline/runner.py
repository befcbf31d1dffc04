"""Runs passes over a graph: times them, pays their fuel and shows the graph to observers behind each."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Generator, Iterator, Sequence

from torch.fx import Node

from mixq_compile.ir.changes import Fingerprint
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline.failures import pass_failure, verification_failure
from mixq_compile.pipeline.history import History, PassRecord
from mixq_compile.pipeline.observers import Ran, Verification, observers_for
from mixq_compile.pipeline.passes import Decision, Pass, PassContext


def run_passes(
    passes: Sequence[Pass],
    text: str,
    graph: CapturedGraph,
    context: PassContext,
    verification: Verification,
    snapshots: bool,
) -> History:
    """Runs the passes in order. Raises PassError where one fails, PassVerificationError where one errs."""
    observers = observers_for(verification, snapshots)
    history = History(text, None)
    with _collector_paused():
        for observer in observers:
            observer.before(graph, history)
        fingerprint = Fingerprint(graph)
        for index, step in enumerate(passes, 1):
            record = _run_pass(index, step, graph, context, history)
            ran = Ran(graph, step, fingerprint.changes(graph))
            for observer in observers:
                record = observer.behind(ran, record)
            fingerprint.accept(graph, ran.changes.created)  # observers may annotate what is new
            history.records.append(record)
            if record.violations:
                raise verification_failure(graph, record.violations, record, history)
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
