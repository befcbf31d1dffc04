"""Terminal view of a comparison; rich is imported when one is asked for, and respects NO_COLOR."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mixq_compile.inspection.alike import group_alike
from mixq_compile.inspection.blast_radius import layer_of
from mixq_compile.inspection.comparison import (
    SQNR_NOISE,
    GraphComparison,
    InspectionComparison,
    LayerChange,
    PassChange,
)
from mixq_compile.inspection.cost import ROWS
from mixq_compile.inspection.layers import LayerSummary
from mixq_compile.inspection.node_matching import PROVENANCE
from mixq_compile.inspection.patch import patch
from mixq_compile.inspection.program import program_line, statement
from mixq_compile.inspection.text import node_changes
from mixq_compile.ir.snapshot import NodeRow

if TYPE_CHECKING:
    from rich.console import Console

LINES = 40
MEBIBYTE = 2**20
NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A column of the table of layers: shown where one of its fields differs."""

    heading: str
    fields: tuple[str, ...]
    cell: Callable[[LayerSummary], str]


COLUMNS = (
    Column("role", ("role",), lambda layer: layer.role),
    Column("N×K", ("out_features", "in_features"), lambda layer: f"{layer.out_features}×{layer.in_features}"),
    Column("dtype", ("dtype",), lambda layer: layer.dtype),
    Column("scheme", ("scheme",), lambda layer: layer.scheme or layer.dtype),
    Column("kernel", ("kernel",), lambda layer: layer.kernel or NOTHING),
    Column("capacity", ("capacity",), lambda layer: str(layer.capacity)),
    Column("calibrated", ("calibrated_columns",), lambda layer: str(layer.calibrated_columns)),
    Column("bytes", ("bytes_after",), lambda layer: f"{layer.bytes_after:,}"),
    Column("left alone because", ("skip",), lambda layer: layer.skip or ""),
)
ONE_SIDED = ("N×K", "scheme", "kernel", "bytes")
"""Columns that tell of a layer that only one side has."""
OF_QUANTIZED = ("kernel", "capacity", "calibrated")
"""Columns that follow from the scheme where one side has none."""
STYLES = {"-": "red", "+": "green", "~": "yellow", "@": "cyan", " ": ""}
SIDES: tuple[Callable[[LayerChange], LayerSummary | None], ...] = (
    lambda change: change.before,
    lambda change: change.after,
)
_NUMBER = re.compile(r"_\d+(?![A-Za-z\d])|(?<=[A-Za-z]\.)\d+(?=\.)")
"""Numbers in names: of layers, and of nodes, where the first of a kind has none."""


def print_comparison(
    comparison: InspectionComparison, console: Console | None = None, *, lines: int = LINES
) -> None:
    """Prints what differs: passes, operators, layers, and at most so many lines of nodes."""
    from rich.console import Console

    target = console if console is not None else Console(highlight=False)
    if comparison:
        releases = len({comparison.before.release, comparison.after.release}) > 1
        for side, inspection in (("A", comparison.before), ("B", comparison.after)):
            release = f"  by mixq-compile {inspection.release}" if releases else ""
            line = f"{side}  {inspection.model}  ({inspection.inputs}){release}"
            target.print(line, style="bold", markup=False, soft_wrap=True)
    for note in dict.fromkeys((*comparison.before.notes, *comparison.after.notes)):
        target.print(f"note: {note}", style="yellow", markup=False)
    if not comparison.graphs:
        target.print("no difference: neither has a graph")
    for graph in comparison.graphs:
        if len(comparison.graphs) > 1:
            target.print(f"\ngraph {graph.name or 'without a name'}", style="bold", markup=False)
        target.print(summary(graph), markup=False, soft_wrap=True)
        _print_passes(graph, target)
        if graph:
            _print_operators(graph, target)
        _print_layers(graph, target)
        _print_nodes(graph, target, lines)


def summary(graph: GraphComparison) -> str:
    """One line: how many nodes and layers differ, or that none does."""
    if not graph:
        nodes, layers = _count(len(graph.after.rows), "node"), _count(graph.layer_counts[1], "layer")
        same = f"no difference: {nodes}, {layers}"
        return f"{same}; the passes differ, and what they made is the same" if graph.passes else same
    diff = graph.nodes
    counts = (
        (len(diff.removed), "removed"),
        (len(diff.added), "added"),
        (len(diff.changed), "changed"),
        (len(diff.moved), "moved"),
    )
    nodes = ", ".join(f"{number} {what}" for number, what in counts if number) or "alike"
    differing = sum(map(bool, graph.layers))
    sizes = _change(*(f"{count / MEBIBYTE:.2f}" for count in graph.weight_bytes))
    weights = f"; weights of linears {sizes} MiB" if "→" in sizes else ""
    return (
        f"nodes: {nodes} (of {_change(len(graph.before.rows), len(graph.after.rows))}); "
        f"layers: {differing} differ (of {_change(*graph.layer_counts)}){weights}"
    )


def operator_lines(graph: GraphComparison) -> list[str]:
    """Operators that are called more or less often, the largest change first."""
    counts = sorted(graph.op_counts.items(), key=lambda entry: (-abs(entry[1][1] - entry[1][0]), entry[0]))
    return [
        f"{name} {before} → {after} ({'+' if after > before else '−'}{abs(after - before)})"
        for name, (before, after) in counts
    ]


def pass_lines(change: PassChange) -> Iterator[str]:
    """A pass that differs, as lines of a patch."""
    for sign, record in (("-", change.before), ("+", change.after)):
        if record is not None:
            verdicts = [(record.count(verdict), verdict) for verdict in ("applied", "skipped", "noted")]
            found = [violation.message for violation in record.violations]
            facts = [
                f"nodes {node_changes(record)}",
                *(f"{number} {verdict}" for number, verdict in verdicts if number),
                *found,
                *(["fuel spent"] if record.stopped else []),
            ]
            yield f"{sign} {record.index} {record.spec}  # {', '.join(facts)}"


def layer_rows(graph: GraphComparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of the table of layers: columns that differ, one row for layers that are alike."""
    changes = graph.layers
    shown = [column for column in COLUMNS if any(_shows(column, change) for change in changes)]
    measured = [column for column in _measured_columns() if any(column[1]([change]) for change in changes)]
    program = {
        change.fqn: (_sign(change), *(_cell(column, change) for column in shown)) for change in changes
    }
    by_name = {change.fqn: change for change in changes}
    rows = []
    for group in group_alike(program):
        sign, *cells = program[group.fqns[0]]
        members = [by_name[fqn] for fqn in group.fqns]
        rows.append((f"{sign} {group.label}", *cells, *(cell(members) for _, cell in measured)))
    headings = ("layer", *(column.heading for column in shown), *(heading for heading, _ in measured))
    return headings, rows


def _measured_columns() -> list[tuple[str, Callable[[Sequence[LayerChange]], str]]]:
    """Headings, and the cell of layers that are alike; empty where nothing worth a cell was measured."""
    costs = [(f"µs at M={rows}", partial(_cost, rows=str(rows))) for rows in (ROWS[0], ROWS[-1])]
    return [("outliers found", _found), ("SQNR dB", _sqnr), *costs]


def _print_passes(graph: GraphComparison, target: Console) -> None:
    if not graph.passes:
        return
    _print_title("passes", target)
    for change in graph.passes:
        for line in pass_lines(change):
            target.print(line, style=STYLES[line[0]], markup=False, soft_wrap=True)


def _print_operators(graph: GraphComparison, target: Console) -> None:
    found = operator_lines(graph)
    if found:
        _print_title("operators called", target)
        for line in found:
            target.print(f"  {line}", markup=False, soft_wrap=True)


def _print_layers(graph: GraphComparison, target: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not graph.layers:
        return
    headings, rows = layer_rows(graph)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=place == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row), style=STYLES[row[0][0]])
    _print_title("layers" if any(graph.layers) else "layers, measured only", target)
    target.print(table)


def _print_nodes(graph: GraphComparison, target: Console, limit: int) -> None:
    if not graph.nodes:
        return
    _print_title("nodes, by their names in A", target)
    lines = node_lines(graph)
    for line in lines[:limit]:
        target.print(line, style=STYLES[line[0]], markup=False, soft_wrap=True)
    if len(lines) > limit:
        left = len(lines) - max(limit, 0)
        target.print(
            f"… {_count(left, 'more line')}: --lines {len(lines)} shows all", style="dim", markup=False
        )


def node_lines(graph: GraphComparison) -> list[str]:
    """Nodes that are gone (-), new (+) or other than before (~), layer by layer in the order of the program.

    Layers that differ in the same way are shown once.
    """
    known = {change.fqn: None for change in graph.layers}
    blocks: dict[str, list[str]] = {}
    for row, lines in _changed_nodes(graph):
        blocks.setdefault(layer_of(row.fqn, known) or row.fqn, []).extend(lines)
    alike = group_alike(
        {fqn: tuple(_NUMBER.sub("", line) for line in lines) for fqn, lines in blocks.items()}
    )
    found: list[str] = []
    for group in alike:
        found += [f"@@ {group.label or 'outside of every module'}", *blocks[group.fqns[0]]]
    return found


def _changed_nodes(graph: GraphComparison) -> Iterator[tuple[NodeRow, list[str]]]:
    moved = set(graph.nodes.moved)
    for line in patch(graph.before, graph.nodes):
        old, new = graph.before.by_name.get(line.row.name), graph.after.by_name.get(line.row.name)
        if line.sign == " " or (line.sign == "-" and new is not None):
            continue
        if old is None or new is None:
            yield line.row, [f"{line.sign} {program_line(line.row)}"]
        elif old.line != new.line:
            yield new, [f"- {program_line(old)}", f"+ {program_line(new)}"]
        else:
            notes = [*_annotation_changes(old, new), *(["moved"] if new.name in moved else [])]
            yield new, [f"~ {statement(new)}  # {'; '.join(notes)}"]


def _annotation_changes(old: NodeRow, new: NodeRow) -> list[str]:
    """Annotations that differ, by path; of schemes with different names the names alone."""
    before, after = dict(_leaves(old.annotations)), dict(_leaves(new.annotations))
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if "scheme" in changed:
        changed = [name for name in changed if not name.startswith(("parameters.", "policy."))]
    hidden = PROVENANCE & set(changed)
    return [
        f"{name} {before.get(name, NOTHING)} → {after.get(name, NOTHING)}"
        for name in changed
        if name not in hidden
    ]


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shows(column: Column, change: LayerChange) -> bool:
    before, after = change.before, change.after
    if before is None or after is None:
        return column.heading in ONE_SIDED
    if column.heading in OF_QUANTIZED and (before.scheme is None or after.scheme is None):
        return False
    return any(name in column.fields for name in change.differing)


def _sign(change: LayerChange) -> str:
    """Whether only one side has the layer, both have it, or just its measurements differ."""
    if change.before is None:
        return "+"
    return "-" if change.after is None else "~" if change else " "


def _cell(column: Column, change: LayerChange) -> str:
    before, after = (
        column.cell(layer) if layer is not None else "" for layer in (change.before, change.after)
    )
    return _change(before, after) if before and after else after or before


def _sqnr(changes: Sequence[LayerChange]) -> str:
    known = [change.sqnr_change for change in changes if change.sqnr_change is not None]
    if not known or all(abs(change) <= SQNR_NOISE for change in known):
        return ""
    sides = (
        [layer.sqnr_db for change in changes if (layer := side(change)) and layer.sqnr_db is not None]
        for side in SIDES
    )
    return " → ".join(_range(values, "{:.1f}".format) for values in sides)


def _found(changes: Sequence[LayerChange]) -> str:
    if not any(change.found_change for change in changes):
        return ""
    sides = (
        [
            layer.found_columns
            for change in changes
            if (layer := side(change)) and layer.found_columns is not None
        ]
        for side in SIDES
    )
    return " → ".join(_range(values, str) for values in sides)


def _cost(changes: Sequence[LayerChange], rows: str) -> str:
    """Expected microseconds of layers whose program differs; those of equal layers differ by device alone."""
    sides = []
    for side in SIDES:
        layers = [side(change) for change in changes if change]
        costs = [
            layer.costs[rows]["microseconds"]["after"] for layer in layers if layer and rows in layer.costs
        ]
        sides.append(_range(costs, _microseconds) if costs else "")
    before, after = sides
    return f"{before} → {after}" if before and after and before != after else ""


def _range(values: Sequence[float], form: Callable[[float], str]) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low}…{high}"


def _microseconds(count: float) -> str:
    return f"{count:.3g}" if count < 999.5 else f"{count:.0f}"


def _change(before: object, after: object) -> str:
    return f"{before}" if before == after else f"{before} → {after}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _print_title(title: str, target: Console) -> None:
    target.print(f"\n{title}", style="bold", markup=False)
