"""Atom: 4-bit codes in groups along K, and columns of 8 bits at fixed places."""

from __future__ import annotations

from collections.abc import Sequence

from mixq_compile.area.assumptions import DEFAULT, Assumptions
from mixq_compile.area.layout import answer
from mixq_compile.area.mixed_circuits import grouped_circuit
from mixq_compile.area.report import AreaReport


def estimate_area_atom(
    X_shape: Sequence[int],
    W_shape: Sequence[int],
    num_high_precision_cols: int = 128,
    group_size: int = 128,
    *,
    report: bool = False,
    assumptions: Assumptions = DEFAULT,
) -> float | AreaReport:
    """The area of an Atom linear with so many columns of X in 8 bits.

    Groups of `group_size` input features have a scale each. The columns are permuted to the end
    beforehand. The authors keep 128.

    X is (seq_len, in) and W (in, out). Returns the area in `assumptions.technology`; with `report` the whole
    report. Raises OptionError for shapes that do not fit, or columns outside 0 to in,
    or a group size that does not divide in.
    """
    return answer(
        grouped_circuit(
            "atom",
            X_shape,
            W_shape,
            num_high_precision_cols,
            group_size,
            assumptions,
            bits=4,
            high_bits=8,
        ),
        report,
    )
