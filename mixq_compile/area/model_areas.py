"""Areas of all linears of a model by scheme, and area against error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mixq_compile.area.assumptions import Assumptions
from mixq_compile.area.linear_areas import NEEDS_COLUMNS, LinearSize, linear_area
from mixq_compile.area.report import AreaReport

DOTS_PER_INCH = 120
COLOURS = 10
MARKERS = "os^D"


@dataclass(frozen=True)
class Layer:
    """One linear, and what was measured of it."""

    fqn: str
    size: LinearSize
    sqnr_db: Mapping[str, float] = field(default_factory=dict)
    """By scheme; only of those that were measured."""


@dataclass(frozen=True)
class SchemeTotal:
    """One scheme over all linears, computed one after the other."""

    scheme: str
    area: float
    """Of the largest linear's circuit: one that computes all of them."""
    cycles: int
    area_cycles: float
    """Sum over linears of each one's own circuit times its cycles."""
    energy_pj: float
    sqnr_db: float | None
    """Of the mean relative noise of the layers; None where it was not measured."""


@dataclass(frozen=True)
class ModelAreas:
    """Reports by layer and scheme."""

    layers: tuple[Layer, ...]
    reports: Mapping[str, Mapping[str, AreaReport]]
    """By layer, then by scheme."""
    assumptions: Assumptions

    @property
    def schemes(self) -> tuple[str, ...]:
        """Every scheme that was estimated."""
        return tuple(next(iter(self.reports.values()), {}))

    def totals(self) -> tuple[SchemeTotal, ...]:
        """Each scheme over all layers."""
        made = []
        for scheme in self.schemes:
            reports = [self.reports[layer.fqn][scheme] for layer in self.layers]
            made.append(
                SchemeTotal(
                    scheme,
                    area=max(report.total for report in reports),
                    cycles=sum(report.cycles for report in reports),
                    area_cycles=math.fsum(report.area_cycles for report in reports),
                    energy_pj=math.fsum(report.energy_pj for report in reports),
                    sqnr_db=mean_sqnr(layer.sqnr_db.get(scheme) for layer in self.layers),
                )
            )
        return tuple(made)

    def to_json(self) -> dict[str, Any]:
        """Every report, total and error as JSON-able data."""
        front = pareto_front(self.totals())
        return {
            "assumptions": self.assumptions.to_json(),
            "layers": [
                {
                    "fqn": layer.fqn,
                    **asdict(layer.size),
                    "sqnr_db": dict(layer.sqnr_db),
                    "schemes": {
                        scheme: _without_assumptions(report)
                        for scheme, report in self.reports[layer.fqn].items()
                    },
                }
                for layer in self.layers
            ],
            "totals": [
                {**asdict(total), "on_pareto_front": total.scheme in front} for total in self.totals()
            ],
        }


def model_areas(layers: Sequence[Layer], schemes: Sequence[str], assumptions: Assumptions) -> ModelAreas:
    """The report of each layer under each scheme. Raises OptionError as `linear_area` does."""
    reports = {
        layer.fqn: {scheme: linear_area(layer.size, scheme, assumptions) for scheme in schemes}
        for layer in layers
    }
    return ModelAreas(tuple(layers), reports, assumptions)


def without_columns(layers: Iterable[Layer], schemes: Iterable[str]) -> list[str]:
    """The schemes that need a number of outlier columns which some layer lacks."""
    known = all(layer.size.outlier_columns is not None for layer in layers)
    return [] if known else [scheme for scheme in schemes if scheme in NEEDS_COLUMNS]


def mean_sqnr(values: Iterable[float | None]) -> float | None:
    """The decibels of the mean relative noise; None unless every value is there."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    if not known or len(known) < len(listed):
        return None
    noise = math.fsum(10 ** (-value / 10) for value in known) / len(known)
    return -10 * math.log10(noise) if noise else math.inf


def is_error(sqnr_db: float | None) -> bool:
    """True for a measured error; false where none was measured, or there is none: an infinite SQNR."""
    return sqnr_db is not None and math.isfinite(sqnr_db)


def pareto_front(totals: Iterable[SchemeTotal]) -> list[str]:
    """The schemes with a measured error that no other one beats in both area × cycles and error.

    One that makes no error at all, as the one that changes nothing, has none to compare.
    """
    front: list[str] = []
    best = -math.inf
    measured = [
        (total.area_cycles, -float(total.sqnr_db or 0.0), total)
        for total in totals
        if is_error(total.sqnr_db)
    ]
    for _, negative, total in sorted(measured, key=lambda entry: entry[:2]):
        if -negative > best:
            best = -negative
            front.append(total.scheme)
    return front


def draw(areas: ModelAreas, target: Path) -> None:
    """Area × cycles against error as PNG: a point for each layer and scheme, and each scheme's total."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    totals = [total for total in areas.totals() if total.sqnr_db is not None and math.isfinite(total.sqnr_db)]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    for place, total in enumerate(totals):
        points = [
            (areas.reports[layer.fqn][total.scheme].area_cycles, layer.sqnr_db[total.scheme])
            for layer in areas.layers
        ]
        color = f"C{place % COLOURS}"
        marker = MARKERS[place // COLOURS % len(MARKERS)]
        left.scatter(*zip(*points, strict=True), s=18, color=color, marker=marker)
        right.scatter(total.area_cycles, total.sqnr_db, s=45, color=color, marker=marker, label=total.scheme)
    front = {scheme: place for place, scheme in enumerate(pareto_front(totals))}
    line = sorted((total for total in totals if total.scheme in front), key=lambda one: front[one.scheme])
    right.plot([one.area_cycles for one in line], [one.sqnr_db for one in line], color="black", linewidth=0.8)
    for axes, title in ((left, "each linear"), (right, "all linears, and the Pareto front")):
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="minor", labelbottom=False)
        axes.set_xlabel(f"area × cycles ({areas.assumptions.unit})")
        axes.set_title(title, fontsize=10)
    left.set_ylabel("SQNR in dB")
    figure.legend(loc="outside right center", fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(target, dpi=DOTS_PER_INCH)
    pyplot.close(figure)


def _without_assumptions(report: AreaReport) -> dict[str, Any]:
    return {name: value for name, value in report.to_json().items() if name != "assumptions"}
