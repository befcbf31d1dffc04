"""QUIK: 4-bit codes, X with a zero point, and columns in FP16 at fixed places."""

from __future__ import annotations

from collections.abc import Sequence

from mixq_compile.area.assumptions import DEFAULT, Assumptions
from mixq_compile.area.layout import answer
from mixq_compile.area.mixed_circuits import mixed_circuit
from mixq_compile.area.report import AreaReport


def estimate_area_quik(
    X_shape: Sequence[int],
    W_shape: Sequence[int],
    num_high_precision_cols: int,
    *,
    report: bool = False,
    assumptions: Assumptions = DEFAULT,
) -> float | AreaReport:
    """The area of a QUIK linear of 4 bits with so many columns of X in FP16.

    The columns are permuted to the end beforehand, so that nothing is compared. The authors keep 256.

    X is (seq_len, in) and W (in, out). Returns the area in `assumptions.technology`; with `report` the whole
    report. Raises OptionError for shapes that do not fit, or columns outside 0 to in.
    """
    return answer(
        mixed_circuit(
            "quik",
            X_shape,
            W_shape,
            num_high_precision_cols,
            assumptions,
            weight_bits=4,
            activation_bits=4,
            finds_columns=False,
            asymmetric_activation=True,
        ),
        report,
    )
