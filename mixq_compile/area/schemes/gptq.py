"""GPTQ: 4-bit weights, scaled by FP16 scalars of groups, then a product in FP16."""

from __future__ import annotations

from collections.abc import Sequence

from mixq_compile.area.assumptions import DEFAULT, Assumptions
from mixq_compile.area.layout import answer
from mixq_compile.area.report import AreaReport
from mixq_compile.area.weight_only_circuits import weight_only_circuit


def estimate_area_gptq(
    X_shape: Sequence[int],
    W_shape: Sequence[int],
    num_groups: int,
    *,
    report: bool = False,
    assumptions: Assumptions = DEFAULT,
) -> float | AreaReport:
    """The area of a GPTQ linear whose W has so many groups.

    Its error feedback happens before deployment; the circuit is that of AWQ.

    X is (seq_len, in) and W (in, out). Returns the area in `assumptions.technology`; with `report` the whole
    report. Raises OptionError for shapes that do not fit,
    or a number of groups that does not divide what `assumptions.groups` names.
    """
    return answer(
        weight_only_circuit("gptq", X_shape, W_shape, num_groups, assumptions, bits=4),
        report,
    )
