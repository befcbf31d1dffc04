"""Estimates against synthesis on this machine: skipped where yosys or the cell library is absent."""

from __future__ import annotations

import pytest

from mixq_compile.area.synthesis import ProgramMissing
from mixq_compile.area.unit_circuits import FITTED
from mixq_compile.area.validation import HELD_OUT, as_text, validate


def test_estimates_are_within_their_bounds_of_synthesis() -> None:
    try:
        rows = validate(quick=True)
    except ProgramMissing as error:
        pytest.skip(str(error))
    assert {row.kind for row in rows} == {"unit", "dot", "linear"}
    assert not any(row.used_to_fit for row in rows), "the quick check is of circuits outside the table"
    assert all(row.holds for row in rows), as_text([row for row in rows if not row.holds])


def test_no_held_out_width_is_in_the_table() -> None:
    for name, widths in HELD_OUT.items():
        shared = [one for one in widths if one in FITTED.get(name, ())]
        assert not shared, f"{name}: predictions rest on {shared}"
