"""A scheme that makes no error has no SQNR that could be compared: not applicable, and no star."""

from __future__ import annotations

import math

from mixq_compile.area.model_areas import SchemeTotal, pareto_front
from mixq_compile.cli.area_results import _decibel


def total(scheme: str, area: float, sqnr_db: float | None) -> SchemeTotal:
    return SchemeTotal(scheme, area, 1, area, 1.0, sqnr_db)


def test_it_takes_no_place_on_the_front():
    totals = [total("exact", 9.0, math.inf), total("good", 3.0, 40.0), total("worse", 4.0, 30.0)]
    assert pareto_front(totals) == ["good"]
    assert pareto_front([total("cheap and exact", 1.0, math.inf), *totals]) == ["good"]
    assert pareto_front([total("not measured", 1.0, None)]) == []


def test_its_figure_is_not_applicable():
    assert [_decibel(value) for value in (math.inf, -math.inf, math.nan, 31.25)] == [
        "n/a",
        "n/a",
        "n/a",
        "31.2",
    ]
