"""What differs between two inspections: nodes, operators, layers and passes.

Names of nodes depend on the capture, so nodes are matched by module, operator and surroundings. What was
measured (times, errors, outlier columns found while running) is kept beside the layers, but is no
difference; nor is where a node comes from: its Python line and the passes that made it.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mixq_compile.errors import OptionError, unknown_name
from mixq_compile.inspection.alike import group_alike
from mixq_compile.inspection.inspection import InspectedGraph, Inspection
from mixq_compile.inspection.layers import LayerSummary, lies_in
from mixq_compile.inspection.node_matching import renamed_like, without_speedups
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.snapshot import Snapshot
from mixq_compile.pipeline.history import PassRecord

FORMAT = "mixq-comparison"
SCHEMA_VERSION = 1
SQNR_NOISE = 0.5
"""Decibels by which a layer's error varies for no reason worth a line."""
NO_PROGRAM = frozenset(
    {"where", "found_columns", "sqnr_db", "weights_db", "inputs_db", "left_out", "costs", "area"}
)
"""Fields of a layer that were measured, or say where it comes from."""
PROGRAM = tuple(field.name for field in dataclasses.fields(LayerSummary) if field.name not in NO_PROGRAM)
"""Fields of a layer whose difference is one of the program."""


@dataclass(frozen=True)
class LayerChange:
    """One linear that is not the same in both; truthy where more than measurements differ."""

    fqn: str
    before: LayerSummary | None
    """None where only the second has it."""
    after: LayerSummary | None
    """None where only the first has it."""

    @property
    def differing(self) -> tuple[str, ...]:
        """The fields of PROGRAM that differ; all of them where only one side has the layer."""
        if self.before is None or self.after is None:
            return PROGRAM
        return tuple(name for name in PROGRAM if _value(self.before, name) != _value(self.after, name))

    @property
    def sqnr_change(self) -> float | None:
        """By how many dB the layer's own output came closer to full precision; None where not measured."""
        before, after = self._measured("sqnr_db")
        return None if before is None or after is None else after - before

    @property
    def found_change(self) -> int | None:
        """By how many the outlier columns grew that were found while running; None where nothing was run."""
        before, after = self._measured("found_columns")
        return None if before is None or after is None else after - before

    @property
    def is_noteworthy(self) -> bool:
        """True where the layer differs, or was measured to behave differently."""
        return bool(self) or abs(self.sqnr_change or 0.0) > SQNR_NOISE or bool(self.found_change)

    def __bool__(self) -> bool:
        return bool(self.differing)

    def _measured(self, name: str) -> tuple[Any, Any]:
        return getattr(self.before, name, None), getattr(self.after, name, None)

    def to_json(self) -> dict[str, Any]:
        """The change as JSON-able data."""
        return {
            "fqn": self.fqn,
            "differs": bool(self),
            "differing": list(self.differing),
            "sqnr_change_db": self.sqnr_change,
            "before": dataclasses.asdict(self.before) if self.before is not None else None,
            "after": dataclasses.asdict(self.after) if self.after is not None else None,
        }


@dataclass(frozen=True)
class PassChange:
    """A pass that only one of the pipelines has, or that has other options or did something else."""

    before: PassRecord | None
    after: PassRecord | None

    def to_json(self) -> dict[str, Any]:
        """The change as JSON-able data: text and counts of both, without their nodes."""
        return {
            side: {"index": record.index, **_work(record)} if record is not None else None
            for side, record in (("before", self.before), ("after", self.after))
        }


@dataclass(frozen=True)
class GraphComparison:
    """What differs between two graphs; truthy where their programs or layers do."""

    name: str
    before: Snapshot
    """The first program behind its last pass; the selected nodes where a pattern was given."""
    after: Snapshot
    """The second one, its nodes under the names of those that they were matched with."""
    nodes: GraphDiff
    """What turns one program into the other."""
    layers: tuple[LayerChange, ...]
    """Linears that differ or were measured to, in the order in which they run."""
    layer_counts: tuple[int, int]
    passes: tuple[PassChange, ...]
    """Passes that differ; they make no difference where what they made is the same."""
    pipelines: tuple[str, str]
    weight_bytes: tuple[int, int]
    """Of all linears behind the last pass."""

    def __bool__(self) -> bool:
        return bool(self.nodes) or any(self.layers)

    @property
    def op_counts(self) -> dict[str, tuple[int, int]]:
        """How often each operator is called in both, for those whose counts differ."""
        before, after = self.before.op_counts(), self.after.op_counts()
        pairs = {name: (before.get(name, 0), after.get(name, 0)) for name in before | after}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON-able data; names of nodes are those of the first."""
        return {
            "name": self.name,
            "differs": bool(self),
            "node_counts": [len(self.before.rows), len(self.after.rows)],
            "layer_counts": list(self.layer_counts),
            "weight_bytes": list(self.weight_bytes),
            "pipelines": list(self.pipelines),
            "passes": [change.to_json() for change in self.passes],
            "op_counts": {name: list(pair) for name, pair in self.op_counts.items()},
            "layers": [change.to_json() for change in self.layers],
            "nodes": self.nodes.to_json(),
        }


@dataclass(frozen=True)
class InspectionComparison:
    """What differs between two compilations; truthy where a program or a layer of theirs does."""

    before: Inspection
    after: Inspection
    graphs: tuple[GraphComparison, ...]

    def __bool__(self) -> bool:
        return any(self.graphs)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able data, with its format and schema version."""
        return {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "differs": bool(self),
            **{
                side: {
                    "model": inspection.model,
                    "inputs": inspection.inputs,
                    "release": inspection.release,
                    "notes": list(inspection.notes),
                }
                for side, inspection in (("before", self.before), ("after", self.after))
            },
            "graphs": [graph.to_json() for graph in self.graphs],
        }


def compare(before: Inspection, after: Inspection, fqn: str | None = None) -> InspectionComparison:
    """Compares two inspections, or only their layers that `fqn` means: a name, a part of one, or a glob.

    Raises OptionError where it means none, and where an inspection holds no programs.
    """
    graphs = tuple(_compare_graphs(one, other, fqn) for one, other in _pairs(before, after))
    if fqn is not None and not any(graph.before.rows or graph.after.rows for graph in graphs):
        raise unknown_name("layer", fqn, _names(before, after))
    return InspectionComparison(before, after, graphs)


def _names(*inspections: Inspection) -> set[str]:
    """What a pattern could be: names of layers with `*` for their numbers, and the last part of each."""
    fqns = [layer.fqn for side in inspections for graph in side.graphs for layer in graph.layers]
    patterns = {group.pattern for group in group_alike(dict.fromkeys(fqns))}
    return patterns | {fqn.rpartition(".")[2] for fqn in fqns}


def _pairs(
    before: Inspection, after: Inspection
) -> Iterator[tuple[InspectedGraph | None, InspectedGraph | None]]:
    """Graphs of one name, then the others by position; None where one side has no more."""
    named = {graph.name: graph for graph in after.graphs}
    common = {graph.name for graph in before.graphs if graph.name in named}
    yield from ((graph, named[graph.name]) for graph in before.graphs if graph.name in common)
    yield from itertools.zip_longest(
        (graph for graph in before.graphs if graph.name not in common),
        (graph for graph in after.graphs if graph.name not in common),
    )


def _compare_graphs(
    before: InspectedGraph | None, after: InspectedGraph | None, fqn: str | None
) -> GraphComparison:
    program = _program(before)
    old_rows, new_rows = _selected(program, fqn), _selected(renamed_like(program, _program(after)), fqn)
    old_layers, new_layers = _layers(before, fqn), _layers(after, fqn)
    changes = [
        LayerChange(name, old_layers.get(name), new_layers.get(name)) for name in old_layers | new_layers
    ]
    given = before or after
    return GraphComparison(
        name=given.name if given is not None else "",
        before=old_rows,
        after=new_rows,
        nodes=GraphDiff.between(old_rows, new_rows),
        layers=tuple(change for change in changes if change.is_noteworthy),
        layer_counts=(len(old_layers), len(new_layers)),
        passes=tuple(_pass_changes(_records(before), _records(after))),
        pipelines=(
            before.history.pipeline if before is not None else "",
            after.history.pipeline if after is not None else "",
        ),
        weight_bytes=(
            sum(layer.bytes_after for layer in old_layers.values()),
            sum(layer.bytes_after for layer in new_layers.values()),
        ),
    )


def _program(graph: InspectedGraph | None) -> Snapshot:
    if graph is None:
        return Snapshot(())
    try:
        return graph.history.final
    except LookupError as error:
        raise OptionError(f"the programs cannot be compared: {error}") from error


def _records(graph: InspectedGraph | None) -> Sequence[PassRecord]:
    return graph.history.records if graph is not None else ()


def _selected(snapshot: Snapshot, pattern: str | None) -> Snapshot:
    if pattern is None:
        return snapshot
    return Snapshot(tuple(row for row in snapshot.rows if lies_in(row.fqn, pattern)))


def _layers(graph: InspectedGraph | None, pattern: str | None) -> dict[str, LayerSummary]:
    layers = graph.layers if graph is not None else ()
    return {layer.fqn: layer for layer in layers if pattern is None or lies_in(layer.fqn, pattern)}


def _value(layer: LayerSummary, name: str) -> Any:
    """A field as it is compared: without the measured times that a reason may quote."""
    value = getattr(layer, name)
    return without_speedups(value) if name == "skip" and value is not None else value


def _pass_changes(before: Sequence[PassRecord], after: Sequence[PassRecord]) -> Iterator[PassChange]:
    old_names, new_names = (
        [record.spec.partition("{")[0] for record in records] for records in (before, after)
    )
    matcher = difflib.SequenceMatcher(None, old_names, new_names, autojunk=False)
    for kind, old_start, old_end, new_start, new_end in matcher.get_opcodes():
        old, new = before[old_start:old_end], after[new_start:new_end]
        if kind == "equal":
            yield from (
                PassChange(one, other)
                for one, other in zip(old, new, strict=True)
                if _work(one) != _work(other)
            )
        else:
            yield from (PassChange(record, None) for record in old)
            yield from (PassChange(None, record) for record in new)


def _work(record: PassRecord) -> dict[str, Any]:
    """What a pass was and did, without its time."""
    diff = record.diff or GraphDiff()
    return {
        "spec": record.spec,
        "nodes": {"added": len(diff.added), "removed": len(diff.removed), "changed": len(diff.changed)},
        "decisions": {verdict: record.count(verdict) for verdict in ("applied", "skipped", "noted")},
        "violations": [violation.message for violation in record.violations],
        "stopped": record.stopped,
    }
