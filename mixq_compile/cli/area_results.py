"""What `mixq area` shows and writes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixq_compile.area.comparison import ORDERS, Comparison, Model
from mixq_compile.area.model_areas import Layer, ModelAreas, draw, is_error, pareto_front
from mixq_compile.area.published import CAVEATS, SETTING, SOURCE, published_area
from mixq_compile.area.report import rounded
from mixq_compile.benchmarking.results import NO_MATPLOTLIB, Table
from mixq_compile.cli.output import console, print_table
from mixq_compile.inspection.alike import group_alike
from mixq_compile.json_values import finite

PICOJOULES_IN_MICROJOULE = 1e6
NAME = "area"
SIMULATED = (
    "errors: mixq's own schemes are measured. Of the others the number formats are simulated, with weights "
    "rounded to nearest: calibration as in AWQ, GPTQ, QUIK and Atom makes their errors smaller."
)


@dataclass(frozen=True)
class AreaDocument:
    """Notes and tables, for a terminal and as Markdown."""

    title: str
    notes: tuple[str, ...]
    tables: tuple[tuple[Table, int], ...]
    """Each with the number of its columns that are text."""

    def print(self) -> None:
        """Writes everything to stdout."""
        target = console()
        target.print(self.title, style="bold", markup=False)
        for note in self.notes:
            target.print(f"note: {note}", style="yellow", markup=False)
        for table, left in self.tables:
            print_table(target, table.title, table.columns, table.rows, left=left)
            if table.note:
                target.print(table.note, style="dim", markup=False)

    def markdown(self) -> str:
        """Everything for reading in a file."""
        notes = "\n".join(f"- {note}" for note in self.notes)
        parts = [
            f"## {self.title}",
            *([notes] if notes else []),
            *(table.markdown() for table, _ in self.tables),
        ]
        return "\n\n".join(parts) + "\n"


def model_document(model: str, areas: ModelAreas, notes: Sequence[str]) -> AreaDocument:
    """Totals by scheme, then every linear; alike ones share their rows."""
    measured = any(layer.sqnr_db for layer in areas.layers)
    said = [*notes, *([SIMULATED] if measured else [])]
    assumed = areas.assumptions
    rows = areas.layers[0].size.rows
    title = (
        f"{model}: circuit area in {assumed.unit}, {assumed.lanes_k} lanes, folding {assumed.folding}, "
        f"{rows} {'row' if rows == 1 else 'rows'}"
    )
    return AreaDocument(title, tuple(said), ((_totals(areas), 1), (_linears(areas), 2)))


def _decibel(sqnr_db: float) -> str:
    return f"{sqnr_db:.1f}" if is_error(sqnr_db) else "n/a"


def _totals(areas: ModelAreas) -> Table:
    totals = areas.totals()
    base = next((total.area_cycles for total in totals if total.scheme == "fp16"), None)
    front = pareto_front(totals)
    rows = tuple(
        (
            total.scheme,
            rounded(total.area),
            str(total.cycles),
            rounded(total.area_cycles),
            "–" if base is None else f"{total.area_cycles / base:.2f}",
            rounded(total.energy_pj / PICOJOULES_IN_MICROJOULE),
            ("–" if total.sqnr_db is None else _decibel(total.sqnr_db))
            + (" *" if total.scheme in front else ""),
        )
        for total in totals
    )
    columns = ("scheme", "area", "cycles", "area×cycles", "÷ FP16", "energy µJ", "SQNR dB")
    note = (
        "area: of the circuit for the largest linear; cycles, area×cycles and energy: sums over the linears; "
        "SQNR: of their mean noise (n/a: not applicable, it makes none); *: no other measured scheme is "
        "better in both."
    )
    return Table("all linears", columns, rows, note)


def _linears(areas: ModelAreas) -> Table:
    by_name = {layer.fqn: layer for layer in areas.layers}
    shapes = {fqn: (layer.size.out_features, layer.size.in_features) for fqn, layer in by_name.items()}
    rows: list[tuple[str, ...]] = []
    for group in group_alike(shapes):
        members = [by_name[fqn] for fqn in group.fqns]
        out_features, in_features = shapes[group.fqns[0]]
        columns = _range([layer.size.outlier_columns for layer in members], str)
        # The shape stands below the name: beside it the table would be too wide for a terminal.
        heads = [group.label, f"  {out_features}×{in_features}, outlier columns {columns}"]
        lines: list[tuple[str, ...]] = []
        for scheme in areas.schemes:
            reports = [areas.reports[fqn][scheme] for fqn in group.fqns]
            lines.append(
                (
                    scheme,
                    _range([report.total for report in reports], rounded),
                    str(reports[0].cycles),
                    _range([report.area_cycles for report in reports], rounded),
                    _range([report.energy_pj / PICOJOULES_IN_MICROJOULE for report in reports], rounded),
                    _errors(members, scheme),
                )
            )
        lines += [("",) * len(lines[0])] * (len(heads) - len(lines))
        heads += [""] * (len(lines) - len(heads))
        rows += [(head, *line) for head, line in zip(heads, lines, strict=True)]
    headings = ("linear", "scheme", "area", "cycles", "area×cycles", "energy µJ", "SQNR dB")
    return Table("each linear", headings, tuple(rows))


def _range(values: Sequence[Any], text: Callable[[Any], str]) -> str:
    """The lowest and highest value, or the one that they share."""
    if any(value is None for value in values):
        return "–"
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low}–{high}"


def _errors(layers: Sequence[Layer], scheme: str) -> str:
    return _range([layer.sqnr_db.get(scheme) for layer in layers], _decibel)


def comparison_document(found: Comparison) -> AreaDocument:
    """Every scheme in every model, beside the published column, and which orders hold."""
    models = list(found.relative)
    rows = [
        (
            scheme,
            *(f"{found.relative[model][scheme]:.2f}" for model in models),
            "–" if (given := published_area(scheme)) is None else f"{given:g}",
        )
        for scheme in found.relative[models[0]]
    ]
    note = (
        f"FP16: {', '.join(f'{rounded(found.fp16[model])} {model.technology}' for model in models[::2])}. "
        f"Published, never a target: {SOURCE}; {SETTING}. It contains {', '.join(CAVEATS)}."
    )
    columns = ("scheme", *(_short(model) for model in models), "published")
    relative = Table("area relative to FP16: X (1, 4096), W (4096, 11008)", columns, tuple(rows), note)
    orders = tuple(
        (order.claim, order.folding or "any", "yes" if all(held.values()) else _exceptions(held))
        for order in ORDERS
        for held in [found.surviving(order)]
    )
    survived = Table("orders that survive", ("order", "folding", "holds"), orders)
    return AreaDocument("schemes in the published setting", (), ((relative, 1), (survived, 3)))


def _short(model: Model) -> str:
    return f"{model.technology}{', folded' if model.folding != 'none' else ''}"


def _exceptions(held: dict[Model, bool]) -> str:
    return "not in " + "; ".join(str(model) for model, holds in held.items() if not holds)


def write(
    folder: Path, data: dict[str, Any], document: AreaDocument, areas: ModelAreas | None = None
) -> None:
    """Writes JSON, Markdown and, where errors were measured, the plot; says on stderr what."""
    folder.mkdir(parents=True, exist_ok=True)
    said = console(stderr=True)
    written = [folder / f"{NAME}.json", folder / f"{NAME}.md"]
    written[0].write_text(json.dumps(finite(data), indent=1, allow_nan=False) + "\n")
    written[1].write_text(document.markdown())
    if areas is not None:
        if not any(total.sqnr_db is not None for total in areas.totals()):
            said.print("note: no plot: no scheme's error was measured", markup=False)
        elif importlib.util.find_spec("matplotlib") is None:
            said.print(f"note: {NO_MATPLOTLIB}", markup=False)
        else:
            written.append(folder / f"{NAME}.png")
            draw(areas, written[-1])
    for path in written:
        said.print(f"wrote {path}", markup=False, style="dim", soft_wrap=True)
