"""Layers as tables: which pass touched which, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixq_compile.inspection.alike import Alike, group_alike
from mixq_compile.inspection.blast_radius import touches
from mixq_compile.inspection.cost import ROWS
from mixq_compile.inspection.inspection import InspectedGraph
from mixq_compile.inspection.layers import LayerSummary

MEBIBYTE = 2**20
SQNR_STEP = 0.1
KILO = 1000
NOT_FASTER = "not faster"
"""How the reason begins of a linear that was left alone by measured speeds."""


@dataclass(frozen=True)
class LayerTable:
    """Texts of a table: headings, then a row for each layer or group of layers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: str = ""


def touch_table(graph: InspectedGraph, layers: Sequence[LayerSummary], *, each: bool) -> LayerTable:
    """Layers down, passes across: nodes added, removed and changed; passes that touched none are left out.

    With `each` every layer has a row of its own; else those that are alike share one.
    """
    by_pass = {record.index: touches(record, layers) for record in graph.history.records}
    shown = [record for record in graph.history.records if by_pass[record.index]]
    cells = {
        layer.fqn: tuple(
            touch.mark if (touch := by_pass[record.index].get(layer.fqn)) is not None else ""
            for record in shown
        )
        for layer in layers
    }
    columns = tuple(str(record.index) for record in shown)
    title = "nodes that each pass added (+), removed (-) and changed (~); kept: it left the layer alone"
    names = ", ".join(f"{record.index} {record.spec.partition('{')[0]}" for record in shown)
    return LayerTable(title, ("layer", *columns), _rows(cells, each=each), f"passes: {names}")


def summary_table(layers: Sequence[LayerSummary], *, each: bool) -> LayerTable:
    """What became of each layer: scheme, kernel, bits, outlier columns, error, bytes, or why it was left."""
    cells = {layer.fqn: _summary_cells(layer) for layer in layers}
    keys = {fqn: values[:-2] for fqn, values in cells.items()}
    measured = any(layer.weights_db is not None for layer in layers)
    rows = []
    for group in _groups(keys, each=each):
        members = [layer for layer in layers if layer.fqn in group.fqns]
        parts = (_range(members, "weights_db"), _range(members, "inputs_db")) if measured else ()
        figures = (_outliers(members), _range(members, "sqnr_db"), *parts, _area(members))
        rows.append((group.label, *cells[group.fqns[0]][:-2], *figures))
    parts = ("of weights", "of inputs") if measured else ()
    columns = ("layer", "N×K", "scheme", "kernel", "MiB", "outliers", "SQNR dB", *parts, "area")
    title = "what became of each linear; area in NAND2 equivalents"
    legend = (
        "SQNR of weights, of inputs: with only those rounded; the lower of the two makes the error. "
        "outliers: columns kept / slots, + those left out, which widen their rows' scales"
        if measured
        else ""
    )
    return LayerTable(title, columns, tuple(rows), legend)


def cost_table(layers: Sequence[LayerSummary], *, each: bool) -> LayerTable:
    """Operations, and expected time before → after, of each layer at each number of rows."""
    cells = {
        layer.fqn: tuple(_cost(layer, rows) for rows in ROWS) if layer.costs else ("–",) * len(ROWS)
        for layer in layers
    }
    columns = tuple(f"M = {rows}" for rows in ROWS)
    title = "expected µs by a roofline, before → after quantization, at M rows"
    return LayerTable(title, ("layer", *columns), _rows(cells, each=each), _measured(layers))


def _measured(layers: Sequence[LayerSummary]) -> str:
    """The ratios that decided, where they were measured: a roofline holds the product alone."""
    slow = {layer.fqn: layer.skip for layer in layers if layer.skip and layer.skip.startswith(NOT_FASTER)}
    told = [f"{group.label} {slow[group.fqns[0]]}" for group in group_alike(slow)]
    return f"measured, everything included: {'; '.join(told)}" if told else ""


def _groups(cells: dict[str, tuple[str, ...]], *, each: bool) -> list[Alike]:
    return group_alike({fqn: (fqn, values) if each else values for fqn, values in cells.items()})


def _rows(cells: dict[str, tuple[str, ...]], *, each: bool) -> tuple[tuple[str, ...], ...]:
    return tuple((group.label, *cells[group.fqns[0]]) for group in _groups(cells, each=each))


def _summary_cells(layer: LayerSummary) -> tuple[str, ...]:
    shape = f"{layer.out_features}×{layer.in_features}" if layer.out_features else "–"
    if layer.scheme is None:
        return shape, f"left alone: {layer.skip}", "", _mebibytes(layer.bytes_before), "", ""
    sizes = f"{_mebibytes(layer.bytes_before)} → {_mebibytes(layer.bytes_after)}"
    return shape, layer.scheme, layer.kernel or "auto", sizes, _outliers([layer]), _range([layer], "sqnr_db")


def _mebibytes(count: int) -> str:
    return f"{count / MEBIBYTE:.2f}"


def _outliers(layers: Sequence[LayerSummary]) -> str:
    """Outlier columns of capacity: found while running, else calibrated; a range over several layers."""
    capacity = layers[0].capacity
    if not capacity:
        return ""
    if all(layer.found_columns is None and not layer.calibrated_columns for layer in layers):
        return f"≤{capacity}"
    counts = [
        layer.found_columns if layer.found_columns is not None else layer.calibrated_columns
        for layer in layers
    ]
    low, high = min(counts), max(counts)
    kept = f"{low}/{capacity}" if low == high else f"{low}–{high}/{capacity}"
    left_out = max(layer.left_out or 0 for layer in layers)
    return f"{kept} +{left_out}" if left_out else kept


def _range(layers: Sequence[LayerSummary], figure: str) -> str:
    """A figure in dB; a range over several layers."""
    found = [value for layer in layers if (value := getattr(layer, figure)) is not None]
    if not found:
        return ""
    low, high = min(found), max(found)
    return f"{low:.1f}" if high - low < SQNR_STEP else f"{low:.1f}–{high:.1f}"


def _area(layers: Sequence[LayerSummary]) -> str:
    """Thousands of NAND2 equivalents; a range over several layers."""
    found = [layer.area / KILO for layer in layers if layer.area is not None]
    if not found:
        return ""
    low, high = f"{min(found):.2g}k", f"{max(found):.2g}k"
    return low if low == high else f"{low}–{high}"


def _cost(layer: LayerSummary, rows: int) -> str:
    cost = layer.costs[str(rows)]["microseconds"]
    if layer.scheme is None:
        return f"{_figure(cost['before'])}"
    gain = cost["before"] / cost["after"] if cost["after"] else 0
    return f"{_figure(cost['before'])} → {_figure(cost['after'])}  ({gain:.2f}×)"


def _figure(microseconds: float) -> str:
    return f"{microseconds:.3g}" if microseconds < 1000 else f"{microseconds:.0f}"
