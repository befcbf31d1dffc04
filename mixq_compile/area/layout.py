"""From a scheme's stages to a report: how many lanes each stage has, and what follows from that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mixq_compile.area.assumptions import Assumptions
from mixq_compile.area.checks import equal, lanes_fit, matrix
from mixq_compile.area.components import Component
from mixq_compile.area.report import AreaReport
from mixq_compile.errors import OptionError

Per = Literal["row", "column", "dot"]


@dataclass(frozen=True)
class Stage:
    """A part of the circuit, beside the main dot products, that works on a stream of elements."""

    name: str
    component: Callable[[int], Component]
    """The units of so many lanes."""
    work: int
    """Elements for each row of X."""
    lanes: int
    """As wide as the stage is without folding, for each row, column or dot product side by side; wider where
    it would not keep up."""
    per: Per = "dot"
    """What it exists for: a `row` of X, a `column` of W, or each `dot` product."""
    foldable: bool = True
    """False for what exists however rarely it works."""


@dataclass(frozen=True)
class Product:
    """X (rows × in_features) times W (in_features × out_features)."""

    rows: int
    in_features: int
    out_features: int

    @property
    def multiplications(self) -> int:
        """Of the plain matrix product."""
        return self.rows * self.in_features * self.out_features


def cycles_a_row(product: Product, assumptions: Assumptions) -> int:
    """Cycles that the main dot products need for `lanes_m` rows."""
    steps = math.ceil(product.in_features / assumptions.lanes_k)
    return math.ceil(product.out_features / assumptions.lanes_n) * steps * assumptions.initiation_interval


def rate_matched(work: int, main_cycles: int) -> int:
    """Lanes with which a stage does its work in the main dot product's cycles: ceil(work / cycles)."""
    return max(1, math.ceil(work / main_cycles))


def estimate(
    scheme: str,
    product: Product,
    main: Component,
    stages: Sequence[Stage],
    assumptions: Assumptions,
    *,
    multiplications: int,
    settings: Mapping[str, int | str],
) -> AreaReport:
    """The report of a circuit: its main dot products, and the stages beside them.

    Stages keep up with the main dot products, so that the cycles are theirs. Nothing is buffered: what is
    done to a weight is done each time that it passes, once for every `lanes_m` rows.
    """
    side_by_side = {"row": assumptions.lanes_m, "column": assumptions.lanes_n, "dot": assumptions.dots}
    row_cycles = cycles_a_row(product, assumptions)
    passes = math.ceil(product.rows / assumptions.lanes_m)
    cycles = passes * row_cycles
    components = {"main": _times(main, assumptions.dots)}
    lanes = {"main": assumptions.lanes_k * assumptions.dots}
    work = {"main": product.multiplications}
    for stage in stages:
        rows_a_pass = 1 if stage.per == "column" else assumptions.lanes_m
        width = stage.lanes * side_by_side[stage.per]
        if stage.foldable:
            needed = rate_matched(stage.work * rows_a_pass, row_cycles)
            width = needed if assumptions.folding == "rate-matched" else max(width, needed)
        components[stage.name] = stage.component(width)
        lanes[stage.name] = width
        work[stage.name] = stage.work * (passes if stage.per == "column" else product.rows)
    utilisation = {name: work[name] / (lanes[name] * cycles) for name in components}
    technology = assumptions.technology
    return AreaReport(
        scheme=scheme,
        shape=(product.rows, product.in_features, product.out_features),
        settings=settings,
        parts={name: component.area(technology) for name, component in components.items()},
        lanes=lanes,
        bill={name: tuple(map(str, component.units)) for name, component in components.items()},
        cycles=cycles,
        utilisation=utilisation,
        energy_pj=math.fsum(
            component.energy() * utilisation[name] * cycles for name, component in components.items()
        ),
        multiplications=multiplications,
        assumptions=assumptions,
    )


def answer(found: AreaReport, report: bool) -> float | AreaReport:
    """What a named function returns: the area, or with `report` everything about it."""
    if not isinstance(report, bool):
        raise OptionError(f"report must be True or False, not {report!r}.")
    return found if report else found.total


def checked_product(x_shape: Any, w_shape: Any, assumptions: Any, names: tuple[str, str]) -> Product:
    """X times W from their shapes. Raises OptionError where they do not fit each other or the lanes."""
    if not isinstance(assumptions, Assumptions):
        raise OptionError(f"assumptions must be an Assumptions, not {assumptions!r}.")
    x_name, w_name = names
    rows, in_features = matrix(x_name, x_shape)
    depth, out_features = matrix(w_name, w_shape)
    equal(f"{x_name}[1]", in_features, f"{w_name}[0]", depth)
    lanes_fit(assumptions.lanes_k, in_features, w_name)
    return Product(rows, in_features, out_features)


def depth_of(assumptions: Assumptions, products: int) -> int:
    """Products that an exact accumulator holds."""
    return assumptions.exact_depth or products


def fixed_width(assumptions: Assumptions) -> int | None:
    """Bits of integer accumulators; None where they are exact."""
    return assumptions.accumulator_bits if assumptions.accumulators == "fixed" else None


def _times(component: Component, count: int) -> Component:
    return Component(tuple(dataclasses.replace(one, count=one.count * count) for one in component.units))
