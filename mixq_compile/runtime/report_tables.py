"""The report as a value, as text for a terminal, and as a table for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from mixq_compile.inspection.alike import group_alike


@dataclass(frozen=True)
class LinearReport:
    """One linear: what it is, what became of it, and what its outlier state holds now."""

    fqn: str
    role: str
    out_features: int
    in_features: int
    scheme: str | None
    kernel: str | None
    skip: str | None
    outlier_weight_source: str | None
    capacity: int
    outlier_columns: tuple[int, ...]
    overflow: int
    """How often a column found no slot."""
    bytes_before: int
    bytes_after: int
    """Bytes of codes, scales and outlier weights; `bytes_before` where the linear was left alone."""
    float_weight_kept: bool
    """True where the 16- or 32-bit weight is still in memory beside the codes."""
    kept_because: str | None = None
    """Why `release_weights` kept it; None where it was not asked to free it, or did."""


@dataclass(frozen=True)
class Report:
    """The linears of a model, in order; prints as a table."""

    linears: tuple[LinearReport, ...]
    graphs: int
    """Compiled graphs, recompilations included; 0 for a model that only had its modules swapped."""
    fallbacks: tuple[str, ...] = ()
    calls_until_seen: int | None = None
    """After how many calls a write to a weight that torch does not count (`.data`, numpy) is seen."""

    @property
    def quantized(self) -> tuple[LinearReport, ...]:
        """The linears that run quantized."""
        return tuple(linear for linear in self.linears if linear.scheme is not None)

    @property
    def skipped(self) -> tuple[LinearReport, ...]:
        """The linears that were left alone."""
        return tuple(linear for linear in self.linears if linear.scheme is None)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do about linears whose outliers did not fit."""
        return tuple(
            f"{linear.fqn}: columns were turned away {linear.overflow} times, and the {linear.capacity} "
            "largest are kept: raise capacity or threshold to change that, or leave this linear in 16 bit "
            "with ignore."
            for linear in self.quantized
            if linear.overflow
        )

    @property
    def kept(self) -> tuple[str, ...]:
        """Which weights `release_weights` kept, and why."""
        return tuple(
            f"{linear.fqn}: release_weights kept its 16-bit weight: {linear.kept_because}."
            for linear in self.quantized
            if linear.kept_because
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return asdict(self)

    def text(self, *, each: bool = False) -> str:
        """The report as text; linears that are alike but for numbers in their names share a line.

        With `each` every linear has one of its own.
        """
        return "\n".join(self._lines(each))

    def _lines(self, each: bool) -> Iterator[str]:
        before = sum(linear.bytes_before for linear in self.quantized)
        after = sum(linear.bytes_after for linear in self.quantized)
        kept = sum(linear.bytes_before for linear in self.quantized if linear.float_weight_kept)
        yield f"{len(self.quantized)} of {len(self.linears)} linears quantized, {self.graphs} compiled graphs"
        if self.quantized:
            yield (
                f"their weights: {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB packed"
                + (f", and {kept / 2**20:.1f} MiB of originals kept beside them" if kept else "")
            )
        if self.calls_until_seen is not None:
            yield (
                "writes to their weights through .data are seen within about "
                f"{self.calls_until_seen} calls, by mixq_compile.refresh(model) at once"
            )
        yield ""
        yield from _table(self.linears, each=each)
        for fallback in self.fallbacks:
            yield f"a graph was compiled unquantized: {fallback}"
        yield from self.kept
        for advice in self.advice:
            yield f"advice: {advice}"

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return report_html(self)


def _table(linears: Sequence[LinearReport], *, each: bool) -> Iterator[str]:
    """Lines of a table whose columns are as wide as what stands in them."""
    groups = group_alike({linear.fqn: _kind(linear, linear.fqn if each else "") for linear in linears})
    by_name = {linear.fqn: linear for linear in linears}
    members = [[by_name[fqn] for fqn in group.fqns] for group in groups]
    texts = [COLUMNS, *(_texts(group.label, alike) for group, alike in zip(groups, members, strict=True))]
    widths = [max(len(row[place]) for row in texts if place < len(row)) for place in range(len(COLUMNS))]
    left_alone = [None, *(alike[0].skip if alike[0].scheme is None else None for alike in members)]
    for row, skip in zip(texts, left_alone, strict=True):
        shown = [*row[:2], f"left alone: {skip}"] if skip is not None else row
        cells = (
            text if place >= 2 and skip is not None
            else text.rjust(widths[place]) if place in FIGURES else text.ljust(widths[place])
            for place, text in enumerate(shown)
        )  # fmt: skip
        yield "  ".join(cells).rstrip()


COLUMNS = ("linear", "N x K", "scheme", "kernel", "outliers", "overflow")
FIGURES = (1, 4, 5)
"""Columns that are set to the right."""


def _kind(linear: LinearReport, name: str) -> tuple[Any, ...]:
    """What linears have in common that share a line."""
    shape = linear.out_features, linear.in_features
    return name, shape, linear.scheme, linear.kernel, linear.skip, linear.capacity


def _texts(label: str, alike: Sequence[LinearReport]) -> tuple[str, ...]:
    first = alike[0]
    shape = f"{first.out_features} x {first.in_features}"
    if first.scheme is None:
        return label, shape
    columns = [len(linear.outlier_columns) for linear in alike]
    overflow = [linear.overflow for linear in alike]
    outliers = f"{_range(columns)}/{first.capacity}"
    return label, shape, first.scheme, first.kernel or "auto", outliers, _range(overflow)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


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
