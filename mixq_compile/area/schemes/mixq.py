"""mixq's own schemes: integer codes, outlier columns in FP16, W stored as codes."""

from __future__ import annotations

from collections.abc import Sequence

from mixq_compile.area.assumptions import DEFAULT, Assumptions
from mixq_compile.area.layout import answer
from mixq_compile.area.mixed_circuits import mixed_circuit
from mixq_compile.area.report import AreaReport
from mixq_compile.errors import unknown_name

BITS = {"w8a8o16": (8, 8), "w4a4o16": (4, 4), "w4a8o16": (4, 8)}
"""Bits of W and of X, by scheme."""


def estimate_area_mixq(
    X_shape: Sequence[int],
    W_shape: Sequence[int],
    num_high_precision_cols: int,
    scheme: str = "w8a8o16",
    *,
    report: bool = False,
    assumptions: Assumptions = DEFAULT,
) -> float | AreaReport:
    """The area of a linear under one of mixq's schemes with so many columns of X in FP16.

    Each element of X is compared with the threshold, and codes of W are stored: this is LLM.int8 without
    the cast of W, with the scheme's bits.

    X is (seq_len, in) and W (in, out). Returns the area in `assumptions.technology`; with `report` the whole
    report. Raises OptionError for shapes that do not fit, or columns outside 0 to in.
    """
    if scheme not in BITS:
        raise unknown_name("scheme", scheme, BITS)
    weight_bits, activation_bits = BITS[scheme]
    return answer(
        mixed_circuit(
            scheme,
            X_shape,
            W_shape,
            num_high_precision_cols,
            assumptions,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
        ),
        report,
    )
