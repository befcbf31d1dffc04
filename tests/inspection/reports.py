"""Inspections for the tests of the HTML report: measured, deep, of several graphs, and of hostile names."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any

from inspected_models import llama_inspection, run_history

from mixq_compile.inspection.cost import H200
from mixq_compile.inspection.inspection import InspectedGraph, Inspection
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.snapshot import NodeRow, Snapshot
from mixq_compile.ir.verify import Violation
from mixq_compile.pipeline import Decision, History
from mixq_compile.pipeline.history import PassRecord

BLOCKS = 32
HOSTILE = "</script><script>window.broken=1</script>\"'><img src=x onerror='window.broken=1'>"
"""A name that breaks out of a page that does not escape it."""


@functools.cache
def measured_inspection() -> Inspection:
    """The small Llama's, with errors and outlier columns as a run measures them."""
    inspection = llama_inspection()
    (graph,) = inspection.graphs
    layers = tuple(
        dataclasses.replace(layer, found_columns=place % 3, sqnr_db=40.0 + place)
        if layer.scheme is not None
        else layer
        for place, layer in enumerate(graph.layers)
    )
    return dataclasses.replace(inspection, graphs=(dataclasses.replace(graph, layers=layers),))


@functools.cache
def failing_inspection() -> Inspection:
    """Two graphs: one whose fuel ended in a pass, one with a violation."""
    stopped = run_history(fuel=20)
    broken = run_history()
    broken.records[4] = dataclasses.replace(
        broken.records[4], violations=(Violation("output", "its value is wrong"),)
    )
    graphs = tuple(InspectedGraph.of(history, name) for history, name in ((stopped, "0/0"), (broken, "0/1")))
    return Inspection("a failing llama", "", graphs)


def unrecorded_inspection() -> Inspection:
    """One whose run took no snapshots."""
    history = History(
        "a-pass", None, [PassRecord(1, "a-pass", 0.1, None, (Decision("", "", "noted", "ok"),))]
    )
    return Inspection("an unrecorded model", "", (InspectedGraph.of(history),))


def hostile_inspection() -> Inspection:
    """One whose every text would break out of a page that does not escape it."""
    rows = tuple(
        NodeRow(
            name=f"{HOSTILE}{number}",
            op="call_function",
            target=HOSTILE,
            args=HOSTILE,
            inputs=inputs,
            value=HOSTILE,
            fqn=HOSTILE,
            where=HOSTILE,
            annotations={"skip": HOSTILE},
        )
        for number, inputs in enumerate([(), (f"{HOSTILE}0",), (f"{HOSTILE}1",)])
    )
    after = tuple(dataclasses.replace(row, value="int8[1]") for row in rows[:2])
    diff = GraphDiff.between(Snapshot(rows), Snapshot(after))
    decision = Decision(f"{HOSTILE}0", HOSTILE, "applied", HOSTILE, {HOSTILE: HOSTILE}, HOSTILE)
    record = PassRecord(1, HOSTILE, 1.0, diff, (decision,), (Violation("", HOSTILE),))
    history = History(HOSTILE, Snapshot(rows), [record])
    return Inspection(HOSTILE, HOSTILE, (InspectedGraph.of(history, HOSTILE),), {HOSTILE: 1.0}, (HOSTILE,))


@functools.cache
def deep_inspection() -> Inspection:
    """The small Llama's graph of two blocks as often as 32 blocks take, one behind the other."""
    small = llama_inspection().graphs[0].history
    copies = range(BLOCKS // 2)
    initial = tuple(_copied(row, copy) for copy in copies for row in small.initial.rows)
    records = [
        dataclasses.replace(
            record,
            diff=_copied_diff(record.diff, copies),
            decisions=tuple(
                _copied_decision(decision, copy) for copy in copies for decision in record.decisions
            ),
        )
        for record in small.records
    ]
    history = History(small.pipeline, Snapshot(initial), records)
    return Inspection("a deep llama", "input_ids int64[2, 6]", (InspectedGraph.of(history, figures=H200),))


def _copied_diff(diff: GraphDiff | None, copies: range) -> GraphDiff | None:
    if diff is None:
        return None
    return GraphDiff(
        added=tuple(_copied(row, copy) for copy in copies for row in diff.added),
        removed=tuple(_copied(row, copy) for copy in copies for row in diff.removed),
        changed=tuple(
            (_copied(old, copy), _copied(new, copy)) for copy in copies for old, new in diff.changed
        ),
        placed=tuple(
            (f"{name}_c{copy}", _previous(previous, copy))
            for copy in copies
            for name, previous in diff.placed
        ),
    )


def _previous(name: str | None, copy: int) -> str | None:
    """What stands before a node of this copy; before the first one stands the end of the copy before."""
    if name is not None:
        return f"{name}_c{copy}"
    return f"output_c{copy - 1}" if copy else None


def _copied(row: NodeRow, copy: int) -> NodeRow:
    data = _renumbered(row.to_json(), copy)
    data["name"] = f"{row.name}_c{copy}"
    data["inputs"] = tuple(f"{name}_c{copy}" for name in row.inputs)
    data["args"] = re.sub(r"%(\w+)", rf"%\1_c{copy}", row.args)
    return NodeRow(**data)


def _copied_decision(decision: Decision, copy: int) -> Decision:
    data = _renumbered(dataclasses.asdict(decision), copy)
    return Decision(**{**data, "node": f"{decision.node}_c{copy}" if decision.node else ""})


def _renumbered(data: dict[str, Any], copy: int) -> dict[str, Any]:
    """The same with the numbers of the blocks that this copy stands for."""
    text = re.sub(
        r"(layers[._])(\d)", lambda found: f"{found[1]}{int(found[2]) + 2 * copy}", json.dumps(data)
    )
    renumbered: dict[str, Any] = json.loads(text)
    return renumbered
