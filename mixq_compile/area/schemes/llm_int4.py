"""LLM.int4: integer codes, with outlier columns in FP16 that are found while it runs."""

from __future__ import annotations

from collections.abc import Sequence

from mixq_compile.area.assumptions import DEFAULT, Assumptions
from mixq_compile.area.layout import answer
from mixq_compile.area.mixed_circuits import mixed_circuit
from mixq_compile.area.report import AreaReport


def estimate_area_llm_int4(
    X_shape: Sequence[int],
    W_shape: Sequence[int],
    num_high_precision_cols: int,
    *,
    report: bool = False,
    assumptions: Assumptions = DEFAULT,
) -> float | AreaReport:
    """The area of an LLM.int4 linear with so many columns of X in FP16.

    Columns with a magnitude of 6 or more go to FP16. Scattering and gathering include the casts, of W as
    well unless `assumptions.casts_weight` is False.

    X is (seq_len, in) and W (in, out). Returns the area in `assumptions.technology`; with `report` the whole
    report. Raises OptionError for shapes that do not fit, or columns outside 0 to in.
    """
    return answer(
        mixed_circuit(
            "llm_int4",
            X_shape,
            W_shape,
            num_high_precision_cols,
            assumptions,
            weight_bits=4,
            activation_bits=4,
            stores_codes=False,
        ),
        report,
    )
