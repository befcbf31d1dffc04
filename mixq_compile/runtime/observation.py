"""What a running backend shows of its work: reports in files, torch's structured trace, the log."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from torch.fx import Node

from mixq_compile.inspection.cost import H200, DeviceFigures
from mixq_compile.inspection.html import save_html
from mixq_compile.inspection.inspection import InspectedGraph, Inspection
from mixq_compile.inspection.program import program_text
from mixq_compile.inspection.text import node_changes
from mixq_compile.ir import names
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.verify import describe
from mixq_compile.pipeline import History
from mixq_compile.runtime import torch_compat

log = logging.getLogger(__name__)

_REPORTS: dict[Path, list[tuple[str, str, InspectedGraph]]] = {}
"""By report file: model, inputs and graph of each compilation of this process."""


def observe(graph: CapturedGraph, history: History, report: str | None) -> None:
    """Shows one compilation in the log, in torch's structured trace, and in the named report file if any."""
    _log(history)
    _trace(history)
    if report is not None:
        _add_to_report(Path(report).expanduser().resolve(), graph, history)


def _log(history: History) -> None:
    """A line for each pass at INFO; each decision and each changed program at DEBUG, made only if wanted."""
    for record in history.records:
        log.info(
            "pass %d %s: %.1f ms, nodes %s, %d applied, %d skipped",
            record.index, record.spec, record.milliseconds, node_changes(record),
            record.count("applied"), record.count("skipped"),
        )  # fmt: skip
        for decision in record.decisions if log.isEnabledFor(logging.DEBUG) else ():
            log.debug("  %s %s: %s", decision.verdict, decision.fqn or decision.node, decision.reason)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("the graph after all passes:\n%s", program_text(history.final))


def _trace(history: History) -> None:
    """An artifact for the captured graph and for each pass that changed it, named so that they sort."""
    torch_compat.trace_artifact("mixq_after_00_capture", partial(_program_after, history, 0))
    for record in history.records:
        if record.diff:
            name = f"mixq_after_{record.index:02d}_{record.spec.partition('{')[0]}"
            torch_compat.trace_artifact(name, partial(_program_after, history, record.index))


def _program_after(history: History, index: int) -> str:
    return program_text(history.snapshot(index))


def _add_to_report(path: Path, graph: CapturedGraph, history: History) -> None:
    """Writes the report anew with this graph added; graphs have the names that torch gives compilations."""
    compilations = _REPORTS.setdefault(path, [])
    name = torch_compat.compile_id() or f"graph {len(compilations)}"
    taken = sum(known.name.partition(" (")[0] == name for _, _, known in compilations)
    label = f"{name} ({taken + 1})" if taken else name
    inspected = InspectedGraph.of(history, label, _figures(graph))
    compilations.append((model_name(graph), _inputs(graph), inspected))
    models = dict.fromkeys(model for model, _, _ in compilations if model)
    milliseconds = sum(record.milliseconds for *_, known in compilations for record in known.history.records)
    inspection = Inspection(
        model=", ".join(models) or "a compiled model",
        inputs="; ".join(dict.fromkeys(inputs for _, inputs, _ in compilations)),
        graphs=tuple(known for *_, known in compilations),
        seconds={"passes": milliseconds / 1000},
    )
    save_html(inspection, path)
    log.info("graph %s is in the report %s", label, path)


def _figures(graph: CapturedGraph) -> DeviceFigures | None:
    """Figures for expected times; none on a CPU, where they would have to be measured."""
    values = (graph.value(node) for node in graph.graph.nodes)
    return H200 if any(getattr(value, "is_cuda", False) for value in values) else None


def _user_inputs(graph: CapturedGraph) -> list[Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder" and graph.tensor(node) is None]


def _inputs(graph: CapturedGraph) -> str:
    return ", ".join(f"{node.name} {describe(graph.value(node))}".strip() for node in _user_inputs(graph))


def model_name(graph: CapturedGraph) -> str:
    """The class of the outermost module that the graph's nodes name; empty where they name only torch's.

    Dynamo leaves out the model itself.
    """
    kinds = (names.outermost_type(node) for node in graph.graph.nodes)
    return next((kind.rpartition(".")[2] for kind in kinds if kind is not None), "")
