# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment,var-annotated"
"""Row scales, codes and the extracted outlier columns of some rows, in one pass over them."""

from __future__ import annotations

from mixq_compile.kernels.tl.growth import GROWN, HEADER, TICKET
from mixq_compile.kernels.tl.toolkit import tl, triton
from mixq_compile.ops.outlier_state import (
    COUNT,
    FLAG,
    FROZEN,
    LARGEST_RELATIVE,
    RELATIVE_BITS,
    SMALLEST_RELATIVE,
    TEACHING_LIMIT,
)
from mixq_compile.ops.weight_codes import EPSILON

FIXED, SNAPSHOT, CHECK, ALWAYS = range(4)
"""What happens besides quantizing: nothing; the count is reported; also the flag goes up where a row
that teaches exceeds the threshold; it goes up in any case."""

_EPSILON, _TEACHING_LIMIT = tl.constexpr(EPSILON), tl.constexpr(TEACHING_LIMIT)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)
_FIXED, _CHECK, _ALWAYS = (tl.constexpr(mode) for mode in (FIXED, CHECK, ALWAYS))
_COUNT, _FLAG, _FROZEN = (tl.constexpr(place) for place in (COUNT, FLAG, FROZEN))
_TICKET, _GROWN, _HEADER = tl.constexpr(TICKET), tl.constexpr(GROWN), tl.constexpr(HEADER)
_UNIT_EXPONENT = tl.constexpr(254 + RELATIVE_BITS)
_SMALLEST_RELATIVE, _LARGEST_RELATIVE = tl.constexpr(SMALLEST_RELATIVE), tl.constexpr(LARGEST_RELATIVE)


@triton.jit
def larger_or_nan(left, right):
    """For reductions: NaN wins."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def is_inner(column_slot, column, columns):
    """1.0 where a column is no outlier column, else 0.0."""
    slot = tl.load(column_slot + column, mask=column < columns, other=-1)
    return tl.where(slot < 0, 1.0, 0.0)


@triton.jit
def scales_of(largest_of_row, LARGEST_CODE: tl.constexpr):
    """Whether a row is finite, its maximum, its scale and the factor that makes codes of its values."""
    finite = largest_of_row < float("inf")
    row_maximum = tl.where(finite, largest_of_row, 0.0)
    guarded = tl.maximum(row_maximum, _EPSILON)
    row_scale = tl.where(finite, tl.div_rn(guarded, LARGEST_CODE), float("nan"))
    inverse = tl.where(row_maximum < _EPSILON, 0.0, tl.div_rn(LARGEST_CODE, guarded))
    return finite, row_maximum, row_scale, inverse


@triton.jit
def code_of(value, inverse):
    """The product rounded half to even, at most the largest code: the last byte of a float's sum.

    The product must be rounded before it is added: launches say enable_fp_fusion=False.
    """
    return (value * inverse + _ROUNDER).to(tl.int32, bitcast=True)


@triton.jit
def _units(values, per_unit):
    """Magnitudes as whole units, rounded towards 0."""
    return (tl.abs(values.to(tl.float32)) * per_unit).to(tl.int32)


@triton.jit
def _inverse_mean(
    parts, taken, row_maximum, columns, PART: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr
):
    """The inverse of the mean magnitude of a finite row, or 0: `row_factors` of the reference."""
    overall = row_maximum
    if SLOTS > 0:
        overall = tl.maximum(overall, tl.max(tl.abs(taken.to(tl.float32)), axis=0))
    usable = (overall >= _SMALLEST_RELATIVE) & (overall < _LARGEST_RELATIVE)
    exponent = tl.where(usable, overall, 1.0).to(tl.int32, bitcast=True) >> 23
    per_unit = ((-exponent + _UNIT_EXPONENT) << 23).to(tl.float32, bitcast=True)
    units = tl.zeros((PART,), dtype=tl.int32)
    for part in tl.static_range(PARTS):
        units += _units(tl.where(usable, parts[part], 0.0), per_unit)
    total = tl.sum(units, axis=0)
    if SLOTS > 0:
        total += tl.sum(_units(tl.where(usable, taken.to(tl.float32), 0.0), per_unit), axis=0)
    # A sum, because a number of columns is no tensor where it is 1, or in the interpreter.
    count = tl.zeros((), dtype=tl.float32) + columns
    return tl.where(usable, tl.div_rn(count, tl.maximum(total, 1).to(tl.float32)) * per_unit, 0.0)


@triton.jit
def _row(x, row, stride, columns, exists, PART: tl.constexpr, PARTS: tl.constexpr):
    """The parts of a row; zeros where it does not exist."""
    x_row = x + tl.cast(row, tl.int64) * stride
    parts = ()
    for part in tl.static_range(PARTS):
        column = part * PART + tl.arange(0, PART)
        parts = parts + (tl.load(x_row + column, mask=(column < columns) & exists, other=0.0),)  # noqa: RUF005
    return parts


@triton.jit
def quantize_rows(
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
    row_mask,  # [M] bool, false where a row teaches nothing, or None
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
    AHEAD: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Quantizes every row that is this program's turn. Writes all of codes, scale and outliers.

    HOLDS keeps in registers which columns are outliers, AHEAD loads a row while the one before is quantized.
    """
    program = tl.program_id(0)
    count = tl.load(counters + _COUNT)
    if MODE != _FIXED:
        tl.store(count_used, count, mask=program == 0)
    if (MODE == _CHECK) | (MODE == _ALWAYS):
        learns = tl.load(counters + _FROZEN) == 0
        tl.store(scratch + _TICKET, 0, mask=program == 0)
        tl.store(scratch + _GROWN, 0, mask=program == 0)
    if (MODE == _CHECK) | (MODE == _ALWAYS):
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
            inner_columns = inner_columns + (is_inner(column_slot, column, columns),)  # noqa: RUF005

    following = ()
    if AHEAD:
        following = _row(x, program, x_stride, columns, program < rows, PART, PARTS)
    for row in range(program, rows, tl.num_programs(0)):
        wide_row = tl.cast(row, tl.int64)
        x_row = x + wide_row * x_stride
        codes_row = codes + wide_row * codes_stride
        if SLOTS > 0:
            taken = tl.load(x_row + outlier_column, mask=place < count, other=0.0)
        # The row stays in registers, in parts because its length is seldom a power of two.
        if AHEAD:
            read = following
            after = row + tl.num_programs(0)
            if HOLDS:
                following = _row(x, after, x_stride, columns, after < rows, PART, PARTS)
            else:
                # Where registers are short, reading the last row twice costs less than another predicate.
                following = _row(x, tl.minimum(after, rows - 1), x_stride, columns, True, PART, PARTS)
        else:
            read = _row(x, row, x_stride, columns, True, PART, PARTS)
        parts = ()
        largest = tl.zeros((PART,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            column = part * PART + tl.arange(0, PART)
            values = read[part].to(tl.float32)
            # Outlier columns become 0, or NaN where they are not finite: that spoils the row.
            if HOLDS:
                inner = values * inner_columns[part]
            else:
                inner = values * is_inner(column_slot, column, columns)
            largest = larger_or_nan(largest, tl.abs(inner))
            parts = parts + (inner,)  # noqa: RUF005
        largest_of_row = tl.reduce(largest, 0, larger_or_nan)

        finite, row_maximum, row_scale, inverse = scales_of(largest_of_row, LARGEST_CODE)
        tl.store(scale + row, row_scale)
        if (MODE == _CHECK) | (MODE == _ALWAYS):
            factor = row_maximum * 0.0 + 1.0
            if threshold < 0:
                if SLOTS > 0:
                    factor = _inverse_mean(parts, taken, row_maximum, columns, PART, PARTS, SLOTS)
                else:
                    factor = _inverse_mean(parts, row_maximum, row_maximum, columns, PART, PARTS, SLOTS)
            tl.store(scratch + _HEADER + row, factor.to(tl.int32, bitcast=True))
        if MODE == _CHECK:
            teaches = row_scale < _TEACHING_LIMIT
            if row_mask is not None:
                teaches = teaches & (tl.load(row_mask + row) != 0)
            tl.store(counters + _FLAG, 1, mask=(row_maximum * factor > tl.abs(threshold)) & teaches & learns)

        for part in tl.static_range(PARTS):
            column = part * PART + tl.arange(0, PART)
            rounded = code_of(parts[part], inverse)
            tl.store(codes_row + column, rounded.to(tl.int8), mask=column < columns)
        if finite == 0:
            tl.debug_barrier()
            for part in tl.static_range(PARTS):
                column = part * PART + tl.arange(0, PART)
                tl.store(codes_row + column, tl.zeros((PART,), dtype=tl.int8), mask=column < columns)

        if SLOTS > 0:
            tl.store(outliers + wide_row * slots + place, taken, mask=place < slots)
