"""The tables of docs/area.md: unit areas, the comparison in the published setting, the validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mixq_compile.area
from mixq_compile.area.comparison import MODELS, compare
from mixq_compile.area.published import published_area

VALIDATION = Path(__file__).parent / "results" / "area_validation.json"
UNITS = Path(mixq_compile.area.__file__).parent / "unit_areas.json"
AREAS = ("nand2", "lut6")
KINDS = {"unit": "units", "dot": "dot products", "linear": "whole linears"}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _widths(measured: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in measured.items() if name not in AREAS)


def units() -> str:
    """What each unit takes at each width, as synthesised."""
    rows = []
    for name, measured in json.loads(UNITS.read_text())["units"].items():
        entries = (f"{_widths(one)}: {one['nand2']:.0f} ({one['lut6']})".lstrip(": ") for one in measured)
        rows.append([f"`{name}`", "; ".join(entries)])
    return markdown(["unit", "widths: NAND2 equivalents (LUT6)"], rows)


def comparison() -> str:
    """Every scheme relative to FP16, beside the published column."""
    found = compare()
    header = [f"{model.technology}{', folded' * (model.folding != 'none')}" for model in MODELS]
    rows = []
    for scheme in found.relative[MODELS[0]]:
        given = published_area(scheme)
        areas = (f"{found.relative[model][scheme]:.2f}" for model in MODELS)
        rows.append([f"`{scheme}`", *areas, "–" if given is None else f"{given:g}"])
    return markdown(["scheme", *header, "published"], rows)


def validation() -> str:
    """How far estimates are from synthesis: by kind, then everything that no estimate rests on."""
    found = json.loads(VALIDATION.read_text())
    summary = []
    for kind, plural in KINDS.items():
        for fitted in (True, False):
            rows = [row for row in found["rows"] if row["kind"] == kind and row["used_to_fit"] == fitted]
            if rows:
                worst = (_worst([row for row in rows if row["technology"] == area]) for area in AREAS)
                count = str(len(rows) // len(AREAS))
                which = f"{plural}, {'in the table' if fitted else 'not in the table'}"
                summary.append([which, count, f"{rows[0]['bound']:.0%}", *worst])
    held = [row for row in found["rows"] if not row["used_to_fit"]]
    circuits = {(row["unit"], _widths(row["parameters"])): row for row in held}
    details = [
        [f"`{unit}`", widths, *(_error(held, unit, widths, area) for area in AREAS)]
        for unit, widths in circuits
    ]
    title = f"yosys {found['yosys']}, {found['library']} (`mixq area --validate`):"
    kinds = markdown(["circuits", "number", "bound", "largest error, NAND2", "LUT6"], summary)
    listed = markdown(["not in the table", "sizes", "error, NAND2", "LUT6"], details)
    return f"{title}\n\n{kinds}\n\n{listed}"


def _worst(rows: list[dict[str, Any]]) -> str:
    return f"{max((row['error'] for row in rows), key=abs):+.1%}"


def _error(rows: list[dict[str, Any]], unit: str, widths: str, area: str) -> str:
    found = (
        row["error"]
        for row in rows
        if (row["unit"], _widths(row["parameters"]), row["technology"]) == (unit, widths, area)
    )
    return f"{next(found):+.1%}"
