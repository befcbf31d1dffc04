"""FP16: the product that every other one is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from mixq_compile.area.assumptions import DEFAULT, Assumptions
from mixq_compile.area.layout import answer
from mixq_compile.area.report import AreaReport
from mixq_compile.area.weight_only_circuits import float_circuit


def estimate_area_fp16(
    X_shape: Sequence[int],
    W_shape: Sequence[int],
    *,
    report: bool = False,
    assumptions: Assumptions = DEFAULT,
) -> float | AreaReport:
    """The area of a linear in FP16.

    X is (seq_len, in) and W (in, out). Returns the area in `assumptions.technology`; with `report` the whole
    report. Raises OptionError for shapes that do not fit.
    """
    return answer(
        float_circuit("fp16", X_shape, W_shape, assumptions),
        report,
    )
