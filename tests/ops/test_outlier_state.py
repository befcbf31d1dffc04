"""`OutlierState`: starting, resetting and freezing, in place."""

from __future__ import annotations

import pytest
import torch

from mixq_compile.errors import OptionError
from mixq_compile.ops import quantize_online
from mixq_compile.ops.outlier_state import FROZEN, STATE_FIELDS, OutlierState


def state(capacity: int = 16) -> OutlierState:
    return OutlierState.create(40, capacity, 6.0, "cpu")


def learn(target: OutlierState, *columns: int) -> None:
    x = torch.zeros(2, 40)
    x[0, list(columns)] = 9.0
    quantize_online(x, *target.buffers(), "int8", "exact", 0, "ref")


def contents(target: OutlierState) -> dict[str, object]:
    return {name: getattr(target, name).tolist() for name in STATE_FIELDS} | {"columns": target.columns()}


def test_a_new_state_is_empty() -> None:
    assert state().columns() == []
    assert state().overflow() == 0
    assert state().capacity == 16


def test_buffers_have_the_order_of_the_operators() -> None:
    target = state()
    assert [id(buffer) for buffer in target.buffers()] == [id(getattr(target, name)) for name in STATE_FIELDS]


def test_preloaded_columns_are_ascending_with_their_maxima() -> None:
    target = state()
    target.preload([30, 4], [9.0, 12.0])
    assert target.columns() == [4, 30]
    assert target.column_max[:2].tolist() == [12.0, 9.0]
    assert target.column_slot[4] == 0
    assert target.column_slot[30] == 1
    assert int((target.column_slot >= 0).sum()) == 2


def test_preloading_replaces_what_was_known() -> None:
    target = state()
    learn(target, 7, 8)
    target.preload([1])
    assert target.columns() == [1]
    assert target.column_slot[7] == -1


def test_reset_forgets_what_was_found_and_keeps_what_was_calibrated() -> None:
    target = state()
    target.preload([4], [9.0])
    fresh = contents(target)
    learn(target, 7, 8)
    addresses = [buffer.data_ptr() for buffer in target.buffers()]
    target.reset()
    assert contents(target) == fresh
    assert [buffer.data_ptr() for buffer in target.buffers()] == addresses, (
        "captured graphs hold the old address"
    )


def test_reset_after_overflow_restores_the_threshold() -> None:
    target = state()
    learn(target, *range(20))
    assert target.overflow() == 4
    assert float(target.effective_threshold) == 9.0
    target.reset()
    assert target.overflow() == 0
    assert float(target.effective_threshold) == 6.0


def test_a_frozen_state_learns_nothing_until_reset() -> None:
    target = state()
    learn(target, 7)
    target.freeze()
    learn(target, 8)
    assert target.columns() == [7]
    target.reset()
    learn(target, 8)
    assert target.columns() == [8]


def test_reset_keeps_a_calibrated_state_frozen() -> None:
    target = state()
    target.preload([4])
    target.freeze()
    target.reset()
    assert int(target.counters[FROZEN]) == 1


def test_too_many_columns_name_capacity_and_threshold() -> None:
    with pytest.raises(OptionError, match="17 outlier columns do not fit a capacity of 16: raise capacity"):
        state().preload(range(17))


@pytest.mark.parametrize("column", [-1, 40])
def test_a_column_out_of_range_is_refused(column: int) -> None:
    with pytest.raises(OptionError, match="outside 0…39"):
        state().preload([column])


def test_more_slots_than_columns_is_allowed() -> None:
    target = OutlierState.create(10, 16, 6.0, "cpu")
    x = torch.full((1, 10), 9.0)
    quantize_online(x, *target.buffers(), "int8", "exact", 0, "ref")
    assert target.columns() == list(range(10))
