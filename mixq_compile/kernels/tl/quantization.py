# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
"""`quantize` and `quantize_online`: row scales, codes and the extracted outlier columns in one pass.

An online call is up to three launches: quantize with the columns known so far, raising a flag on the
device where a row exceeds the threshold; `growth` learns the new columns; quantize again. The last two
return at once where the flag is down, so that the host never has to look at it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.kernels.tl.growth import EVICT, KEEP, REDO, REPLACE, TICKET, grow, scratch_for
from mixq_compile.kernels.tl.toolkit import (
    PRIORITY,
    await_previous_launch,
    ceil_div,
    multiprocessors,
    on_device,
    overlap,
    power_of_two,
    row_matrix,
    supports,
    tl,
    triton,
)
from mixq_compile.ops.outlier_state import COUNT, FLAG, FROZEN
from mixq_compile.ops.providers import provider
from mixq_compile.ops.weight_codes import EPSILON, aligned_empty

FIXED, SNAPSHOT, CHECK, ALWAYS, AGAIN = range(5)
"""What a launch of the row kernel does besides quantizing: nothing; reports the count; also raises the
flag where a row exceeds the threshold; raises it in any case; only runs if the state has changed."""

ELEMENTS_PER_THREAD = 8
"""Contiguous columns of a thread: 16 bytes of a 16-bit activation."""
PROGRAMS_PER_MULTIPROCESSOR = 16
PROGRAMS_TO_QUANTIZE_AGAIN = 2
"""So few, because in most calls they only look at the flag."""
FEW_ROWS = 512
"""Up to so many rows, more warps share each."""
PARTS_HELD = 6
"""Where a row has at most so many parts, a program keeps which columns are outliers in registers."""

_EPSILON = tl.constexpr(EPSILON)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)
_FIXED, _CHECK, _ALWAYS, _AGAIN = (tl.constexpr(mode) for mode in (FIXED, CHECK, ALWAYS, AGAIN))
_COUNT, _FLAG, _FROZEN = (tl.constexpr(place) for place in (COUNT, FLAG, FROZEN))
_TICKET, _REDO = tl.constexpr(TICKET), tl.constexpr(REDO)


@triton.jit
def _larger_or_nan(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _is_inner(column_slot, column, columns):
    """1.0 where a column is no outlier column, else 0.0."""
    slot = tl.load(column_slot + column, mask=column < columns, other=-1)
    return tl.where(slot < 0, 1.0, 0.0)


@triton.jit(do_not_specialize=["rows"])
def _quantize_rows(
    x,  # [M, K]
    codes,  # [M, K] int8
    scale,  # [M] fp32
    outliers,  # [M, C]
    index,  # [C] int32
    column_slot,  # [K] int32
    counters,  # [4] int32, or [1] with only the count
    effective_threshold,  # [1] fp32
    count_used,  # [1] int32
    scratch,  # int32, see growth
    rows,
    columns,
    slots,
    x_stride,
    codes_stride,
    LARGEST_CODE: tl.constexpr,
    MODE: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    HOLDS: tl.constexpr,
    SLOTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        await_previous_launch()
    program = tl.program_id(0)
    if MODE == _AGAIN:
        rows = rows * tl.load(scratch + _REDO)
    count = tl.load(counters + _COUNT)
    if MODE != _FIXED:
        tl.store(count_used, count, mask=(program == 0) & (rows > 0))
    if (MODE == _CHECK) | (MODE == _ALWAYS):
        learns = tl.load(counters + _FROZEN) == 0
        tl.store(scratch + _TICKET, 0, mask=program == 0)
        tl.store(scratch + _REDO, 0, mask=program == 0)
    if MODE == _CHECK:
        threshold = tl.load(effective_threshold)
    if MODE == _ALWAYS:
        tl.store(counters + _FLAG, 1, mask=(program == 0) & learns)

    if SLOTS > 0:
        place = tl.arange(0, SLOTS)
        outlier_column = tl.load(index + place, mask=(place < count) & (place < slots), other=0)
    inner_columns = ()
    if HOLDS:
        for part in tl.static_range(PARTS):
            column = part * PART + tl.arange(0, PART)
            inner_columns = inner_columns + (_is_inner(column_slot, column, columns),)  # noqa: RUF005

    for row in range(program, rows, tl.num_programs(0)):
        wide_row = tl.cast(row, tl.int64)
        x_row = x + wide_row * x_stride
        codes_row = codes + wide_row * codes_stride
        if SLOTS > 0:
            taken = tl.load(x_row + outlier_column, mask=place < count, other=0.0)
        # The row stays in registers, in parts because its length is seldom a power of two.
        parts = ()
        largest = tl.zeros((PART,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            column = part * PART + tl.arange(0, PART)
            values = tl.load(x_row + column, mask=column < columns, other=0.0).to(tl.float32)
            # Outlier columns become 0, or NaN where they are not finite: that spoils the row.
            if HOLDS:
                inner = values * inner_columns[part]
            else:
                inner = values * _is_inner(column_slot, column, columns)
            largest = _larger_or_nan(largest, tl.abs(inner))
            parts = parts + (inner,)  # noqa: RUF005
        largest_of_row = tl.reduce(largest, 0, _larger_or_nan)

        finite = largest_of_row < float("inf")
        row_maximum = tl.where(finite, largest_of_row, 0.0)
        guarded = tl.maximum(row_maximum, _EPSILON)
        row_scale = tl.div_rn(guarded, LARGEST_CODE)
        inverse = tl.where(row_maximum < _EPSILON, 0.0, tl.div_rn(LARGEST_CODE, guarded))
        tl.store(scale + row, tl.where(finite, row_scale, float("nan")))
        if MODE == _CHECK:
            tl.store(counters + _FLAG, 1, mask=(row_maximum > threshold) & learns)

        for part in tl.static_range(PARTS):
            column = part * PART + tl.arange(0, PART)
            # The sum's last byte is the product rounded half to even, at most the largest code. The
            # product must be rounded before: the launch says enable_fp_fusion=False.
            rounded = (parts[part] * inverse + _ROUNDER).to(tl.int32, bitcast=True)
            tl.store(codes_row + column, rounded.to(tl.int8), mask=column < columns)
        if finite == 0:
            tl.debug_barrier()
            for part in tl.static_range(PARTS):
                column = part * PART + tl.arange(0, PART)
                tl.store(codes_row + column, tl.zeros((PART,), dtype=tl.int8), mask=column < columns)

        if SLOTS > 0:
            tl.store(outliers + wide_row * slots + place, taken, mask=place < slots)


def _warps(rows: int, columns: int) -> int:
    """Warps that share a row: a thread holds 8 to 64 of its elements up to 32768 columns."""
    parts = 1 if rows <= FEW_ROWS else 4
    wanted = columns // (parts * 32 * ELEMENTS_PER_THREAD)
    return min(16, power_of_two(wanted + 1, at_least=2) // 2)


def _launch(
    mode: int,
    matrix: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    index: Tensor,
    column_slot: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    count_used: Tensor,
    scratch: Tensor,
    bits: int,
) -> None:
    rows, columns = matrix.shape
    codes, scale, outliers = outputs
    slots = index.shape[0]
    warps = _warps(rows, columns)
    part = warps * 32 * ELEMENTS_PER_THREAD
    parts = ceil_div(columns, part)
    resident = PROGRAMS_TO_QUANTIZE_AGAIN if mode == AGAIN else PROGRAMS_PER_MULTIPROCESSOR
    programs = min(rows, resident * multiprocessors(matrix.device))
    _quantize_rows[(programs,)](
        matrix, codes, scale, outliers, index, column_slot, counters, effective_threshold, count_used,
        scratch, rows, columns, slots, matrix.stride(0), codes.stride(0),
        LARGEST_CODE=float(2 ** (bits - 1) - 1), MODE=mode, PART=part, PARTS=parts,
        HOLDS=parts <= PARTS_HELD and rows > programs, SLOTS=power_of_two(slots) if slots else 0,
        num_warps=warps, enable_fp_fusion=False, **overlap(matrix),
    )  # fmt: skip


def _outputs(x: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    leading = tuple(x.shape[:-1])
    codes = aligned_empty(leading, x.shape[-1], torch.int8, x.device)
    scale = torch.empty(leading, dtype=torch.float32, device=x.device)
    return codes, scale, torch.empty((*leading, slots), dtype=x.dtype, device=x.device)


def _as_rows(outputs: tuple[Tensor, Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, outliers = outputs
    return codes.view(rows, codes.shape[-1]), scale.view(rows), outliers.view(rows, outliers.shape[-1])


@provider("quantize", name="tl", priority=PRIORITY, supports=supports)
def quantize(
    x: Tensor, index: Tensor, column_slot: Tensor, count: Tensor, bits: int, small_m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch; at most `small_m` rows are left unwritten, because the weight-only path reads x."""
    outputs = _outputs(x, index.shape[0])
    matrix = row_matrix(x)
    if matrix.shape[0] > small_m:
        rows = _as_rows(outputs, matrix.shape[0])
        with on_device(x):
            _launch(FIXED, matrix, rows, index, column_slot, count, count, count, count, bits)
    return outputs


@provider("quantize_online", name="tl", priority=PRIORITY, supports=supports)
def quantize_online(
    x: Tensor,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    bits: int,
    miss: str,
    small_m: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three launches, of which two return at once where no row exceeds the threshold."""
    outputs = _outputs(x, index.shape[0])
    count_used = torch.empty_like(counters[:1])
    matrix = row_matrix(x)
    if matrix.shape[0] <= small_m:
        return *outputs, count_used
    rows = _as_rows(outputs, matrix.shape[0])
    state = (index, column_slot, counters, effective_threshold)
    with on_device(x):
        if miss == "static":
            _launch(SNAPSHOT, matrix, rows, *state, count_used, counters, bits)
            return *outputs, count_used
        scratch = scratch_for(matrix, index.shape[0])
        first = ALWAYS if miss == "per_call" else CHECK
        _launch(first, matrix, rows, *state, count_used, scratch, bits)
        policy = {"lazy": KEEP, "per_call": REPLACE}.get(miss, EVICT)
        grow(matrix, rows[1], index, column_slot, column_max, counters, effective_threshold, scratch, policy)
        if miss != "lazy":
            _launch(AGAIN, matrix, rows, *state, count_used, scratch, bits)
    return *outputs, count_used
