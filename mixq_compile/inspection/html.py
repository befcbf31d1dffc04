"""The report of an inspection: one HTML file that needs no network and works from a disk."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from mixq_compile.inspection.inspection import InspectedGraph, Inspection
from mixq_compile.inspection.island import island
from mixq_compile.inspection.neighbourhood import pictures_of

STYLES = ("palette.css", "layout.css", "controls.css", "code.css", "tables.css", "pictures.css")
SCRIPTS = (
    "dom.js",
    "formats.js",
    "island.js",
    "graph_model.js",
    "blast_radius.js",
    "state.js",
    "program_text.js",
    "word_difference.js",
    "line_list.js",
    "links.js",
    "header.js",
    "pass_list.js",
    "pass_summary.js",
    "patch.js",
    "changes_view.js",
    "program_view.js",
    "layer_groups.js",
    "layer_columns.js",
    "layers_view.js",
    "decisions_view.js",
    "charts_view.js",
    "neighbourhood_view.js",
    "node_card.js",
    "search.js",
    "keyboard.js",
    "main.js",
)
"""In the order in which they run; `main.js` starts the page."""


def save_html(inspection: Inspection, path: Path) -> None:
    """Writes the report of an inspection."""
    path.write_text(render_html(inspection), encoding="utf-8")


def render_html(inspection: Inspection) -> str:
    """The report of an inspection as one page, which `load_inspection` reads as well."""
    style, script = _style(), _script()
    pictures = [_pictures(graph) for graph in inspection.graphs]
    return Template(_part("page.html")).substitute(
        title=escape(inspection.model or "a graph"),
        policy=_policy(style, script),
        style=style,
        data=island({"inspection": inspection.to_json(), "neighbourhoods": pictures}),
        script=script,
    )


def _pictures(graph: InspectedGraph) -> dict[str, Any]:
    """Of each pass that changed something, by its index: the pictures, and how many kinds have none."""
    before = graph.history.initial
    found: dict[str, Any] = {}
    if before is None:
        return found
    layers = [layer.fqn for layer in graph.layers]
    for record in graph.history.records:
        if not record.diff:
            continue
        after = record.diff.apply(before)
        pictures, left_out = pictures_of(before, after, record.diff, layers)
        found[str(record.index)] = {
            "pictures": [asdict(picture) for picture in pictures],
            "kinds_left_out": left_out,
        }
        before = after
    return found


@cache
def _part(name: str) -> str:
    return resources.files("mixq_compile.inspection").joinpath("page", name).read_text(encoding="utf-8")


@cache
def _style() -> str:
    return "\n" + "\n".join(_part(name) for name in STYLES)


@cache
def _script() -> str:
    parts = "\n".join(_part(name) for name in SCRIPTS)
    return f'\n(() => {{\n"use strict";\n{parts}\n}})();\n'


def _policy(style: str, script: str) -> str:
    """What the page may load: nothing but its own style and script, whatever its data says."""
    return f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'"


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
