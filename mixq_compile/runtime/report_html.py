"""A model's report as a table for notebooks; self-contained, and readable in light and dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixq_compile.runtime.report import LinearReport, Report

MEBIBYTE = 2**20
HEADINGS = ("linear", "N × K", "scheme", "kernel", "outlier columns", "overflow", "MiB before", "after")
RIGHT = "text-align:right"
LEFT = "text-align:left"


def report_html(report: Report) -> str:
    """The report as HTML: a summary, a row for each linear, and what to do about those that overflow."""
    quantized = report.quantized
    before = sum(linear.bytes_before for linear in quantized) / MEBIBYTE
    after = sum(linear.bytes_after for linear in quantized) / MEBIBYTE
    summary = (
        f"<b>{len(quantized)} of {len(report.linears)}</b> linears quantized, {report.graphs} compiled "
        f"graphs; their weights {before:.1f} MiB before, {after:.1f} MiB packed"
    )
    head = "".join(_cell(text, "th", LEFT) for text in HEADINGS)
    body = "".join(_row(linear) for linear in report.linears)
    notes = [f"a graph was compiled unquantized: {text}" for text in report.fallbacks]
    notes += [*report.kept, *report.advice]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<div style="font-size:0.9em"><p>{summary}</p>'
        f'<div style="max-height:30em;overflow:auto"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>" + (f"<ul>{listed}</ul>" if listed else "") + "</div>"
    )


def _row(linear: LinearReport) -> str:
    shape = f"{linear.out_features} × {linear.in_features}"
    if linear.scheme is None:
        texts: Iterable[str] = (linear.fqn, shape, f"left alone: {linear.skip}")
        cells = "".join(_cell(text, "td", LEFT) for text in texts)
        return f'<tr style="opacity:0.65">{cells}<td colspan="5"></td></tr>'
    cells = "".join(
        _cell(text, "td", LEFT) for text in (linear.fqn, shape, linear.scheme, linear.kernel or "auto")
    )
    figures = (
        f"{len(linear.outlier_columns)} of {linear.capacity}",
        str(linear.overflow or ""),
        f"{linear.bytes_before / MEBIBYTE:.2f}",
        f"{linear.bytes_after / MEBIBYTE:.2f}",
    )
    return f"<tr>{cells}{''.join(_cell(text, 'td', RIGHT) for text in figures)}</tr>"


def _cell(text: str, tag: str, style: str) -> str:
    return f'<{tag} style="{style};padding:0.1em 0.6em">{escape(text)}</{tag}>'
