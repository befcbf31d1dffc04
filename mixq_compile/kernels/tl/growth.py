# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Learning new outlier columns on the device: a part of the launch that `quantization` calls learning.

Column maxima are taken by many programs; the last one to finish changes the state. It places columns
by prefix sums, never by atomics, so that the state does not depend on the order of programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.kernels.tl.toolkit import ceil_div, power_of_two, tl, triton
from mixq_compile.ops.outlier_state import COUNT, FLAG, OVERFLOW, TEACHING_LIMIT

EVICT, KEEP, REPLACE = range(3)
"""What happens to known columns when slots run out: the largest of all stay, the known ones stay in any
case, or (policy `per_call`) none is known to begin with."""

TICKET, GROWN, HEADER = 0, 1, 16
"""Places in the scratch buffer: programs done, whether the state has changed; then the arrays begin."""

TILE_COLUMNS = 128
TILE_ROWS = 32
PROGRAMS_WANTED = 256
SELECTION_BLOCK = 2048

_EVICT, _KEEP, _REPLACE = tl.constexpr(EVICT), tl.constexpr(KEEP), tl.constexpr(REPLACE)
_TICKET, _GROWN, _HEADER = tl.constexpr(TICKET), tl.constexpr(GROWN), tl.constexpr(HEADER)
_COUNT, _OVERFLOW, _FLAG = (tl.constexpr(place) for place in (COUNT, OVERFLOW, FLAG))
_LARGEST_FINITE_BITS = tl.constexpr(0x7F7FFFFF)
_TEACHING_LIMIT = tl.constexpr(TEACHING_LIMIT)


@triton.jit
def _aligned(rows):
    return tl.cdiv(rows, 16) * 16


@triton.jit
def _column_maxima(
    x, scale, row_mask, factors, maxima, strip, rows, columns, splits, x_stride,
    POLICY: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bits of the column maxima of every `splits`-th tile of rows, over rows that teach; NaN never does."""
    tiles = tl.cdiv(columns, TILE_COLUMNS)
    column = (strip % tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    split = strip // tiles
    inside = column < columns
    largest = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.int32)
    for start in range(split * TILE_ROWS, rows, splits * TILE_ROWS):
        row = start + tl.arange(0, TILE_ROWS)
        row_scale = tl.load(scale + row, mask=row < rows, other=float("nan"))
        teaches = row_scale == row_scale if POLICY == _REPLACE else row_scale < _TEACHING_LIMIT
        if row_mask is not None:
            teaches = teaches & (tl.load(row_mask + row, mask=row < rows, other=0) != 0)
        mask = teaches[:, None] & inside[None, :]
        values = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
        factor = tl.load(factors + row, mask=row < rows, other=0).to(tl.float32, bitcast=True)
        compared = values.to(tl.float32) * factor[:, None]
        bits = compared.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, bits)
    tl.store(maxima + split * columns + column, tl.max(largest, axis=0), mask=inside)


@triton.jit
def _mark_candidates(
    maxima, keys, column_slot, column_max, effective_threshold, columns, splits,
    POLICY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes each candidate's maximum (its bits) to keys, -1 elsewhere; returns how many there are.

    Candidates are the new columns and, where they can be evicted, the known ones.
    """
    threshold = tl.abs(tl.load(effective_threshold))
    candidates = 0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        bits = tl.zeros((BLOCK,), dtype=tl.int32)
        for split in range(0, splits):
            bits = tl.maximum(bits, tl.load(maxima + split * columns + column, mask=inside, other=0))
        maximum = bits.to(tl.float32, bitcast=True)
        slot = tl.load(column_slot + column, mask=inside, other=-1)
        known = slot >= 0
        if POLICY == _REPLACE:
            key = tl.where(inside & (maximum >= threshold), bits, -1)
        else:
            running = tl.maximum(tl.load(column_max + slot, mask=known, other=0.0), maximum)
            tl.store(column_max + slot, running, mask=known)
            key = tl.where(inside & (slot < 0) & (maximum > threshold), bits, -1)
            if POLICY == _EVICT:
                key = tl.where(known, running.to(tl.int32, bitcast=True), key)
        tl.store(keys + column, key, mask=inside)
        candidates += tl.sum((key >= 0).to(tl.int32), axis=0)
    return candidates


@triton.jit
def _count_above(keys, columns, cut, BLOCK: tl.constexpr):
    above = 0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key = tl.load(keys + column, mask=column < columns, other=-1)
        above += tl.sum((key > cut).to(tl.int32), axis=0)
    return above


@triton.jit
def _find_cut(keys, columns, candidates, room, BLOCK: tl.constexpr):
    """The smallest cut that at most `room` keys lie above; -1 where all candidates fit."""
    low = -1
    high = tl.where(candidates > room, _LARGEST_FINITE_BITS, -1)
    steps = tl.where(candidates > room, 31, 0)
    for _ in range(0, steps):
        middle = low + ((high - low) >> 1)
        fits = _count_above(keys, columns, middle, BLOCK) <= room
        low = tl.where(fits, low, middle + 1)
        high = tl.where(fits, middle, high)
    return high


@triton.jit
def _drop(keys, marks, column_slot, columns, cut, ties, POLICY: tl.constexpr, BLOCK: tl.constexpr):
    """Takes the candidates that find no place out of keys; returns the bits of the largest of them.

    Of those equal to the cut, the `ties` lowest columns stay. Dropped known columns lose their slot,
    which is marked free.
    """
    left_out = 0
    ties_seen = 0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        key = tl.load(keys + column, mask=inside, other=-1)
        slot = tl.load(column_slot + column, mask=inside, other=-1)
        tie = (key == cut) & (key >= 0)
        tie_rank = ties_seen + tl.cumsum(tie.to(tl.int32), axis=0) - 1
        kept = (key > cut) | (tie & (tie_rank < ties))
        dropped = (key >= 0) & (kept == 0)
        left_out = tl.maximum(left_out, tl.max(tl.where(dropped, key, 0), axis=0))
        ties_seen += tl.sum(tie.to(tl.int32), axis=0)
        tl.store(keys + column, -1, mask=dropped)
        if POLICY == _EVICT:
            tl.store(marks + slot, 1, mask=dropped & (slot >= 0))
            tl.store(column_slot + column, -1, mask=dropped & (slot >= 0))
    return left_out


@triton.jit
def _assign(
    keys, free, index, column_slot, column_max, columns, freed, count,
    POLICY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gives the new columns, ascending, the freed slots and then the fresh ones; returns how many."""
    assigned = 0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        key = tl.load(keys + column, mask=inside, other=-1)
        if POLICY == _REPLACE:
            new = key >= 0
        else:
            slot = tl.load(column_slot + column, mask=inside, other=-1)
            new = (key >= 0) & (slot < 0)
        rank = assigned + tl.cumsum(new.to(tl.int32), axis=0) - 1
        fresh = count + rank - freed
        place = tl.where(rank < freed, tl.load(free + rank, mask=new & (rank < freed), other=0), fresh)
        tl.store(index + place, column, mask=new)
        tl.store(column_max + place, key.to(tl.float32, bitcast=True), mask=new)
        if POLICY == _REPLACE:
            tl.store(column_slot + column, tl.where(new, place, -1), mask=inside)
        else:
            tl.store(column_slot + column, place, mask=new)
        assigned += tl.sum(new.to(tl.int32), axis=0)
    return assigned


@triton.jit
def _change_state(
    scratch, index, column_slot, column_max, counters, effective_threshold, rows, columns, slots, splits,
    POLICY: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    keys = scratch + _HEADER + _aligned(rows)
    maxima = keys + columns
    marks = maxima + splits * columns
    free = marks + slots
    place = tl.arange(0, SLOTS)
    count = tl.load(counters + _COUNT)
    if POLICY == _REPLACE:
        count = 0
    room = slots
    if POLICY == _KEEP:
        room = slots - count

    tl.store(marks + place, 0, mask=place < slots)
    candidates = _mark_candidates(
        maxima, keys, column_slot, column_max, effective_threshold, columns, splits, POLICY, BLOCK
    )
    # Each step reads through global memory what other threads of this program wrote in the one before.
    tl.debug_barrier()
    cut = _find_cut(keys, columns, candidates, room, BLOCK)
    ties = room - _count_above(keys, columns, cut, BLOCK)
    tl.debug_barrier()
    left_out = _drop(keys, marks, column_slot, columns, cut, ties, POLICY, BLOCK)
    tl.debug_barrier()
    marked = tl.load(marks + place, mask=place < slots, other=0)
    tl.store(free + tl.cumsum(marked, axis=0) - 1, place, mask=marked != 0)
    freed = tl.sum(marked, axis=0)
    tl.debug_barrier()
    assigned = _assign(keys, free, index, column_slot, column_max, columns, freed, count, POLICY, BLOCK)

    overflow = tl.maximum(candidates - room, 0)
    tl.store(counters + _OVERFLOW, tl.load(counters + _OVERFLOW) + overflow)
    tl.store(counters + _COUNT, count - freed + assigned)
    if POLICY != _REPLACE:
        # Where nothing was left out this is 0, and the threshold stays.
        limit = left_out.to(tl.float32, bitcast=True)
        threshold = tl.load(effective_threshold)
        raised = tl.where(threshold < 0, tl.minimum(threshold, -limit), tl.maximum(threshold, limit))
        tl.store(effective_threshold, raised)


@triton.jit
def grow_state(
    x,  # [M, K]
    scale,  # [M] fp32, NaN in rows that are not finite
    index,  # [C] int32
    column_slot,  # [K] int32
    column_max,  # [C] fp32
    counters,  # [4] int32
    effective_threshold,  # [1] fp32
    scratch,  # int32, see scratch_for
    row_mask,  # [M] bool, false where a row teaches nothing, or None
    rows,
    columns,
    slots,
    splits,
    x_stride,
    POLICY: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Adds the columns above the threshold to the state; says so in `scratch` when that is done."""
    maxima = scratch + _HEADER + _aligned(rows) + columns
    for strip in range(tl.program_id(0), tl.cdiv(columns, TILE_COLUMNS) * splits, tl.num_programs(0)):
        _column_maxima(
            x, scale, row_mask, scratch + _HEADER, maxima, strip, rows, columns, splits, x_stride, POLICY,
            TILE_ROWS, TILE_COLUMNS,
        )  # fmt: skip
    # All threads of a program must have written before its one atomic publishes that.
    tl.debug_barrier()
    done = tl.atomic_add(scratch + _TICKET, 1)
    if done == tl.num_programs(0) - 1:
        _change_state(
            scratch, index, column_slot, column_max, counters, effective_threshold, rows, columns, slots,
            splits, POLICY, BLOCK, SLOTS,
        )  # fmt: skip
        # Every program has read the flag by now, because each has taken its ticket.
        tl.store(counters + _FLAG, 0)
        tl.debug_barrier()
        tl.atomic_xchg(scratch + _GROWN, 1, sem="release")


@triton.jit
def await_growth(scratch):
    """Waits until one of the programs, all of which run at the same time, has changed the state."""
    grown = tl.atomic_add(scratch + _GROWN, 0, sem="acquire")
    while grown == 0:
        grown = tl.atomic_add(scratch + _GROWN, 0, sem="acquire")
    tl.debug_barrier()


def _splits(rows: int, columns: int) -> int:
    wanted = PROGRAMS_WANTED // ceil_div(columns, TILE_COLUMNS)
    return max(1, min(wanted, ceil_div(rows, TILE_ROWS)))


def scratch_for(matrix: Tensor, slots: int) -> Tensor:
    """Uninitialised work memory of one call on `[M, K]`; the first launch of the call clears its header.

    After the header: what each row's magnitudes are multiplied by to compare them `[M]` (rounded up
    to 16), keys `[K]`, partial column maxima `[splits, K]`, marks `[C]`, free slots `[C]`.
    """
    rows, columns = matrix.shape
    length = HEADER + ceil_div(rows, 16) * 16 + columns * (1 + _splits(rows, columns)) + 2 * slots
    return torch.empty(length, dtype=torch.int32, device=matrix.device)


def growth_options(rows: int, columns: int, slots: int, policy: int) -> dict[str, int]:
    """The arguments of `grow_state` from `splits` on that do not depend on the tensors."""
    return {
        "splits": _splits(rows, columns), "POLICY": policy, "TILE_ROWS": TILE_ROWS,
        "TILE_COLUMNS": TILE_COLUMNS, "BLOCK": min(SELECTION_BLOCK, power_of_two(columns)),
        "SLOTS": power_of_two(slots),
    }  # fmt: skip
