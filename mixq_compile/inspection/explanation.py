"""Why a layer is as it is: the decisions about it, in order, and the nodes that compute it in the end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mixq_compile.inspection.inspection import InspectedGraph
from mixq_compile.inspection.layers import LayerSummary
from mixq_compile.inspection.program import program_line
from mixq_compile.pipeline.passes import Decision

KIBIBYTE = 2**10


@dataclass(frozen=True)
class Step:
    """One decision, and the pass that took it."""

    index: int
    spec: str
    decision: Decision


@dataclass(frozen=True)
class Explanation:
    """One layer: decisions, nodes, figures."""

    graph: str
    """The compile id of its graph; empty for an export."""
    layer: LayerSummary
    steps: tuple[Step, ...]
    program: tuple[str, ...]
    """The nodes that compute it in the end, as lines of a program."""

    def figures(self) -> dict[str, str]:
        """What the layer holds and costs, as texts."""
        layer = self.layer
        found: dict[str, str] = {}
        if layer.bytes_before:
            before, after = layer.bytes_before / KIBIBYTE, layer.bytes_after / KIBIBYTE
            found["weight"] = f"{before:.1f} KiB before, {after:.1f} after"
        if layer.capacity:
            known = f"{layer.calibrated_columns} calibrated"
            known += f", {layer.found_columns} when run" if layer.found_columns is not None else ""
            found["outlier columns"] = f"{known}, of at most {layer.capacity}"
        if layer.sqnr_db is not None:
            found["error of the layer alone"] = f"{layer.sqnr_db:.1f} dB SQNR"
        if layer.weights_db is not None and layer.inputs_db is not None:
            found["its parts"] = f"{layer.weights_db:.1f} dB of weights, {layer.inputs_db:.1f} dB of inputs"
        if layer.left_out:
            found["outlier columns left out"] = f"{layer.left_out}: their rows' scales are wider for it"
        if layer.area is not None:
            found["circuit area"] = f"{layer.area:.2g} NAND2 equivalents: 16 lanes, side stages folded"
        for rows, cost in layer.costs.items():
            times, moved = cost["microseconds"], cost["bytes"]
            found[f"expected at M = {rows}"] = (
                f"{times['before']:.4g} → {times['after']:.4g} µs, "
                f"{moved['before'] / KIBIBYTE:.1f} → {moved['after'] / KIBIBYTE:.1f} KiB moved, "
                f"{cost['operations']:.3g} operations"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The explanation as JSON-able data."""
        return dataclasses.asdict(self)


def explanation_of(graph: InspectedGraph, layer: LayerSummary) -> Explanation:
    """Everything that a history says about one layer, by its name and by the nodes that it went through."""
    nodes = _nodes_of(graph, layer.fqn)
    steps = tuple(
        Step(record.index, record.spec, decision)
        for record in graph.history.records
        for decision in record.decisions
        if decision.fqn == layer.fqn or decision.node in nodes
    )
    final = graph.history.final.rows
    program = tuple(program_line(row) for row in final if row.name in nodes and row.op.startswith("call"))
    return Explanation(graph.name, layer, steps, program)


def _nodes_of(graph: InspectedGraph, fqn: str) -> set[str]:
    """Names of all nodes that belong to a layer, or to a product of several that it is part of."""
    history = graph.history
    rows = list(history.initial.rows) if history.initial is not None else []
    for record in history.records:
        if record.diff is not None:
            rows += [*record.diff.added, *(new for _, new in record.diff.changed)]
    return {
        row.name
        for row in rows
        if row.fqn == fqn or any(member.get("fqn") == fqn for member in row.annotations.get("members") or ())
    }
