"""The area of any linear of a model under any scheme, from its sizes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mixq_compile.area import schemes
from mixq_compile.area.assumptions import DEFAULT, Assumptions
from mixq_compile.area.checks import whole_number
from mixq_compile.area.report import AreaReport
from mixq_compile.errors import OptionError, unknown_name

QUIK_COLUMNS = 256
"""That the authors of QUIK keep in FP16, whatever the layer."""
ATOM_COLUMNS = 128
"""That the authors of Atom keep in 8 bits, whatever the layer."""


@dataclass(frozen=True)
class LinearSize:
    """What a scheme's area depends on."""

    out_features: int
    in_features: int
    rows: int = 1
    outlier_columns: int | None = None
    """Columns of X in 16 bits; None where they are not known."""
    rank: int = 32
    """Of LQER; a smaller linear takes its smaller side."""
    group_size: int = 128
    """Input features that share a scale; where it does not divide them, all of them share one."""

    def __post_init__(self) -> None:
        for name in ("out_features", "in_features", "rows", "rank", "group_size"):
            whole_number(name, getattr(self, name), least=1)
        if self.outlier_columns is not None:
            whole_number("outlier_columns", self.outlier_columns, least=0, most=self.in_features)

    @property
    def x_shape(self) -> tuple[int, int]:
        """(rows, in)."""
        return self.rows, self.in_features

    @property
    def w_shape(self) -> tuple[int, int]:
        """(in, out)."""
        return self.in_features, self.out_features

    @property
    def group(self) -> int:
        """Input features of one group of this linear."""
        return self.in_features if self.in_features % self.group_size else self.group_size

    def groups(self, assumptions: Assumptions) -> int:
        """Groups of W: along its rows as many as there are; along its columns one for each output."""
        return self.out_features if assumptions.groups == "outputs" else self.in_features // self.group


Estimate = Callable[[LinearSize, Assumptions], "float | AreaReport"]


def _low_rank(function: Callable[..., float | AreaReport]) -> Estimate:
    def estimate(size: LinearSize, assumptions: Assumptions) -> float | AreaReport:
        rank = min(size.rank, size.in_features, size.out_features)
        factors = (size.in_features, rank), (rank, size.out_features)
        return function(size.x_shape, size.w_shape, *factors, report=True, assumptions=assumptions)

    return estimate


def _plain(function: Callable[..., float | AreaReport]) -> Estimate:
    return lambda size, assumptions: function(
        size.x_shape, size.w_shape, report=True, assumptions=assumptions
    )


def _grouped(function: Callable[..., float | AreaReport]) -> Estimate:
    return lambda size, assumptions: function(
        size.x_shape, size.w_shape, size.groups(assumptions), report=True, assumptions=assumptions
    )


def _columns(function: Callable[..., float | AreaReport], *more: str) -> Estimate:
    return lambda size, assumptions: function(
        size.x_shape, size.w_shape, size.outlier_columns, *more, report=True, assumptions=assumptions
    )


def _quik(size: LinearSize, assumptions: Assumptions) -> float | AreaReport:
    columns = min(QUIK_COLUMNS, size.in_features)
    return schemes.estimate_area_quik(
        size.x_shape, size.w_shape, columns, report=True, assumptions=assumptions
    )


def _atom(size: LinearSize, assumptions: Assumptions) -> float | AreaReport:
    columns = min(ATOM_COLUMNS, size.in_features)
    return schemes.estimate_area_atom(
        size.x_shape, size.w_shape, columns, size.group, report=True, assumptions=assumptions
    )


ESTIMATES: dict[str, Estimate] = {
    "fp16": _plain(schemes.estimate_area_fp16),
    "w8a8": _plain(schemes.estimate_area_w8a8),
    "smoothquant": _plain(schemes.estimate_area_smoothquant),
    "llm_int8": _columns(schemes.estimate_area_llm_int8),
    "llm_int4": _columns(schemes.estimate_area_llm_int4),
    "w8a8o16": _columns(schemes.estimate_area_mixq, "w8a8o16"),
    "w4a8o16": _columns(schemes.estimate_area_mixq, "w4a8o16"),
    "w4a4o16": _columns(schemes.estimate_area_mixq, "w4a4o16"),
    "quik": _quik,
    "atom": _atom,
    "awq": _grouped(schemes.estimate_area_awq),
    "gptq": _grouped(schemes.estimate_area_gptq),
    "lqer_int8": _low_rank(schemes.estimate_area_lqer_int8),
    "lqer_int4": _low_rank(schemes.estimate_area_lqer_int4),
    "lqer_mxint4": _low_rank(schemes.estimate_area_lqer_mxint4),
    "lqer_mxint2": _low_rank(schemes.estimate_area_lqer_mxint2),
}
"""Every scheme, and how its area follows from a linear's sizes."""
NEEDS_COLUMNS = frozenset({"llm_int8", "llm_int4", "w8a8o16", "w4a8o16", "w4a4o16"})
"""Schemes whose number of 16-bit columns depends on what the linear is fed."""


def linear_area(size: LinearSize, scheme: str, assumptions: Assumptions = DEFAULT) -> AreaReport:
    """The report of one linear under one scheme.

    Raises OptionError for an unknown scheme, more lanes than input features, or an unknown number of outlier
    columns where the scheme needs it.
    """
    if scheme not in ESTIMATES:
        raise unknown_name("scheme", scheme, ESTIMATES)
    if scheme in NEEDS_COLUMNS and size.outlier_columns is None:
        raise OptionError(f"outlier_columns is not known, and the area of {scheme} depends on it.")
    found = ESTIMATES[scheme](size, assumptions)
    assert isinstance(found, AreaReport)
    return found
