"""What a benchmark found: as JSON with everything measured, as Markdown, and as plots."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixq_compile.benchmarking.environment import Environment
from mixq_compile.json_values import finite

NO_MATPLOTLIB = "no plots: matplotlib is not installed (pip install 'mixq-compile[bench]')"
DOTS_PER_INCH = 120
PANELS_ACROSS = 2
LONGEST_LEVEL_LABEL = 8


@dataclass(frozen=True)
class Table:
    """A table; the cells are texts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown, under its title."""
        lines = [f"### {self.title}", ""]
        if self.note:
            lines += [self.note, ""]
        lines += [_line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line(row) for row in self.rows]
        return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@dataclass(frozen=True)
class Plot:
    """Groups of bars: one bar of each series in each group; None leaves a gap."""

    title: str
    unit: str
    groups: tuple[str, ...]
    series: Mapping[str, Sequence[float | None]]
    line_at: float | None = None
    """A level to mark, such as a speed-up of 1."""
    panels: tuple[str, ...] = ()
    """For each group the panel that shows it, such as a shape; empty for one panel."""


@dataclass(frozen=True)
class Document:
    """One result. `options`, `cases` and `summary` are JSON-able or dataclasses of such."""

    benchmark: str
    environment: Environment
    options: Any
    cases: tuple[Any, ...]
    summary: dict[str, float | None]
    missing: dict[str, str]
    """Baselines that did not run everywhere, and why."""
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    facts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """More for the JSON: dataclasses under names."""

    def to_json(self) -> dict[str, Any]:
        """Everything measured; tables and plots follow from it."""
        return {
            "benchmark": self.benchmark,
            "environment": dataclasses.asdict(self.environment),
            "options": dataclasses.asdict(self.options),
            "summary": self.summary,
            "missing": self.missing,
            **{name: [dataclasses.asdict(fact) for fact in facts] for name, facts in self.facts.items()},
            "cases": [dataclasses.asdict(case) for case in self.cases],
        }

    def markdown(self) -> str:
        """The result for reading."""
        parts = [f"## mixq bench {self.benchmark}", _environment_line(self.environment)]
        if self.summary:
            parts.append(self._summary().markdown())
        parts += [table.markdown() for table in self.tables]
        if self.missing:
            named = [f"- {name}: {reason}" for name, reason in self.missing.items()]
            parts.append("\n".join(["### Not measured", "", *named]))
        return "\n\n".join(parts) + "\n"

    def _summary(self) -> Table:
        rows = tuple((name, number(value, 3)) for name, value in self.summary.items())
        return Table("Summary", ("", "value"), rows)

    def write(self, folder: Path) -> tuple[list[Path], str]:
        """Writes JSON, Markdown and plots into a folder; returns the files, and why there are no plots."""
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / f"{self.benchmark}.json", folder / f"{self.benchmark}.md"]
        written[0].write_text(json.dumps(finite(self.to_json()), indent=1, allow_nan=False) + "\n")
        written[1].write_text(self.markdown())
        try:
            import matplotlib
        except ImportError:
            return written, NO_MATPLOTLIB
        matplotlib.use("agg")
        for place, plot in enumerate(self.plots, start=1):
            written.append(folder / f"{self.benchmark}-{place}.png")
            draw(plot, written[-1])
        return written, ""


def _environment_line(environment: Environment) -> str:
    parts = [environment.device]
    if environment.threads is not None:
        parts.append(f"{environment.threads} threads")
    parts += [f"torch {environment.torch}", f"mixq-compile {environment.mixq_compile}"]
    parts += [f"{name} {version}" for name, version in environment.packages.items()]
    if environment.commit:
        parts.append(f"commit {environment.commit[:12]}")
    parts.append(f"copy {environment.copy_gigabytes_per_second:.0f} GB/s")
    parts.append(f"empty launch {environment.launch_us:.1f} µs")
    if environment.clocks:
        named = ", ".join(f"{name} {value:g}" for name, value in environment.clocks.items())
        parts.append(f"under load: {named}")
    return "; ".join(parts)


def draw(plot: Plot, target: Path) -> None:
    """Draws bars into a PNG file, a panel for each set of groups; needs matplotlib."""
    from matplotlib import pyplot

    panels: dict[str, list[int]] = {}
    for place, panel in enumerate(plot.panels or [""] * len(plot.groups)):
        panels.setdefault(panel, []).append(place)
    across = min(PANELS_ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    most = max(len(places) for places in panels.values())
    size = (across * max(4.5, 0.6 * most + 1), 3.4 * down + 0.6)
    figure, grid = pyplot.subplots(down, across, figsize=size, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    width = 0.8 / max(1, len(plot.series))
    for axes, (panel, places) in zip(grid.flat, panels.items(), strict=False):
        for number, (name, values) in enumerate(plot.series.items()):
            offset = (number - (len(plot.series) - 1) / 2) * width
            heights = [math.nan if (value := values[place]) is None else value for place in places]
            axes.bar([group + offset for group in range(len(places))], heights, width, label=name)
        if plot.line_at is not None:
            axes.axhline(plot.line_at, color="black", linewidth=0.8)
        axes.set_xticks(range(len(places)), [plot.groups[place] for place in places], fontsize=8)
        if max(len(plot.groups[place]) for place in places) > LONGEST_LEVEL_LABEL:
            axes.tick_params(axis="x", rotation=30)
        axes.set_title(panel, fontsize=9)
    for row in grid:
        row[0].set_ylabel(plot.unit)
    figure.suptitle(plot.title)
    figure.legend(
        *grid.flat[0].get_legend_handles_labels(),
        fontsize=8,
        loc="outside lower center",
        ncols=len(plot.series),
    )
    figure.set_layout_engine("constrained")
    figure.savefig(target, dpi=DOTS_PER_INCH)
    pyplot.close(figure)


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of the values that are there; None where none is."""
    known = [value for value in values if value is not None]
    return math.exp(sum(math.log(value) for value in known) / len(known)) if known else None


def smallest(values: Iterable[float | None]) -> float | None:
    """The smallest of the values that are there; None where none is."""
    return min((value for value in values if value is not None), default=None)


def summarise_missing(cases: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """One text for each baseline that some cases lack: the reasons, and in how many cases."""
    reasons: dict[str, Counter[str]] = {}
    for missing in cases:
        for name, reason in missing.items():
            reasons.setdefault(name, Counter())[reason] += 1
    return {
        name: "; ".join(
            reason if count == len(cases) else f"{reason} ({count} of {len(cases)} cases)"
            for reason, count in counted.items()
        )
        for name, counted in reasons.items()
    }
