"""LQER: W in 8-bit fixed point, X, A and B in 16-bit fixed point."""

from __future__ import annotations

from collections.abc import Sequence

from mixq_compile.area.assumptions import DEFAULT, Assumptions
from mixq_compile.area.layout import answer
from mixq_compile.area.low_rank_circuits import low_rank_circuit
from mixq_compile.area.report import AreaReport


def estimate_area_lqer_int8(
    Xh_shape: Sequence[int],
    Wl_shape: Sequence[int],
    Ah_shape: Sequence[int],
    Bh_shape: Sequence[int],
    *,
    report: bool = False,
    assumptions: Assumptions = DEFAULT,
) -> float | AreaReport:
    """The area of Xh·Wl + (Xh·Ah)·Bh, with W of 8 bits and the rest of 16, in fixed point.

    Xh is (seq_len, in), Wl (in, out), Ah (in, r) and Bh (r, out). Returns the area in
    `assumptions.technology`; with `report` the whole report. Raises OptionError for shapes that do not fit,
    or a rank above min(in, out).
    """
    return answer(
        low_rank_circuit(
            "lqer_int8",
            (Xh_shape, Wl_shape, Ah_shape, Bh_shape),
            assumptions,
            low_bits=8,
            high_bits=16,
            blocks=False,
        ),
        report,
    )
