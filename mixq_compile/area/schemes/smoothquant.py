"""SmoothQuant: W8A8, with the scales that smooth X folded into the layers before."""

from __future__ import annotations

from collections.abc import Sequence

from mixq_compile.area.assumptions import DEFAULT, Assumptions
from mixq_compile.area.layout import answer
from mixq_compile.area.mixed_circuits import mixed_circuit
from mixq_compile.area.report import AreaReport


def estimate_area_smoothquant(
    X_shape: Sequence[int],
    W_shape: Sequence[int],
    *,
    report: bool = False,
    assumptions: Assumptions = DEFAULT,
) -> float | AreaReport:
    """The area of a SmoothQuant linear, which is that of W8A8.

    Its smoothing factors live in the weights and in the norm before: they cost nothing here.

    X is (seq_len, in) and W (in, out). Returns the area in `assumptions.technology`; with `report` the whole
    report. Raises OptionError for shapes that do not fit.
    """
    return answer(
        mixed_circuit("smoothquant", X_shape, W_shape, 0, assumptions, weight_bits=8, activation_bits=8),
        report,
    )
