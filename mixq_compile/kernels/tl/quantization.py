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
    ceil_div,
    multiprocessors,
    on_device,
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

LARGEST_CHUNK = 16384
"""Rows up to this long are held in registers; longer ones are read twice, the second time from L2."""
LONG_ROW_CHUNK = 4096
ELEMENTS_PER_PROGRAM = 8192
ROWS_WORTH_SHARING = 1024
"""From this many rows on, a program takes several, and reads `column_slot` once for all."""

_EPSILON = tl.constexpr(EPSILON)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)
_FIXED, _CHECK, _ALWAYS, _AGAIN = (tl.constexpr(mode) for mode in (FIXED, CHECK, ALWAYS, AGAIN))
_COUNT, _FLAG, _FROZEN = (tl.constexpr(place) for place in (COUNT, FLAG, FROZEN))
_TICKET, _REDO = tl.constexpr(TICKET), tl.constexpr(REDO)


@triton.jit
def _magnitude_bits(values, slot):
    """Bits of |values|, which order as the values do and put infinity and NaN above all finite ones.

    Finite elements of outlier columns count as 0, so that one integer maximum gives both the row
    maximum and whether the row is finite.
    """
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where((slot[None, :] >= 0) & (bits < _INFINITY_BITS), 0, bits)


@triton.jit
def _store_codes(codes, values, slot, inverse, finite, mask, LARGEST_CODE: tl.constexpr):
    inner = tl.where((slot[None, :] < 0) & finite[:, None], values, 0.0)
    # Adding and subtracting rounds half to even; it needs the product rounded first, and so a launch
    # with enable_fp_fusion=False.
    rounded = (inner * inverse[:, None] + _ROUNDER) - _ROUNDER
    clamped = tl.minimum(tl.maximum(rounded, -LARGEST_CODE), LARGEST_CODE)
    tl.store(codes, clamped.to(tl.int8), mask=mask)


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
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(rows, ROWS)
    if MODE == _AGAIN:
        blocks = blocks * tl.load(scratch + _REDO)
    count = tl.load(counters + _COUNT)
    if MODE != _FIXED:
        tl.store(count_used, count, mask=(program == 0) & (blocks > 0))
    if (MODE == _CHECK) | (MODE == _ALWAYS):
        learns = tl.load(counters + _FROZEN) == 0
        tl.store(scratch + _TICKET, 0, mask=program == 0)
        tl.store(scratch + _REDO, 0, mask=program == 0)
    if MODE == _ALWAYS:
        tl.store(counters + _FLAG, 1, mask=(program == 0) & learns)

    chunk = tl.arange(0, CHUNK)
    for block in range(program, blocks, tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        row_inside = row < rows
        x_row = x + row.to(tl.int64)[:, None] * x_stride  # [ROWS, 1]
        codes_row = codes + row.to(tl.int64)[:, None] * codes_stride

        if IN_REGISTERS:
            mask = row_inside[:, None] & (chunk < columns)[None, :]
            slot = tl.load(column_slot + chunk, mask=chunk < columns, other=-1)
            values = tl.load(x_row + chunk[None, :], mask=mask, other=0.0).to(tl.float32)
            row_bits = tl.max(_magnitude_bits(values, slot), axis=1)
        else:
            largest = tl.zeros((ROWS, CHUNK), dtype=tl.int32)
            for start in range(0, columns, CHUNK):
                column = start + chunk
                part_mask = row_inside[:, None] & (column < columns)[None, :]
                part_slot = tl.load(column_slot + column, mask=column < columns, other=-1)
                part = tl.load(x_row + column[None, :], mask=part_mask, other=0.0).to(tl.float32)
                largest = tl.maximum(largest, _magnitude_bits(part, part_slot))
            row_bits = tl.max(largest, axis=1)

        finite = row_bits < _INFINITY_BITS
        row_maximum = tl.where(finite, row_bits, 0).to(tl.float32, bitcast=True)
        guarded = tl.maximum(row_maximum, _EPSILON)
        row_scale = tl.div_rn(guarded, tl.full((ROWS,), LARGEST_CODE, tl.float32))
        inverse = tl.div_rn(tl.full((ROWS,), LARGEST_CODE, tl.float32), guarded)
        inverse = tl.where(row_maximum < _EPSILON, 0.0, inverse)
        tl.store(scale + row, tl.where(finite, row_scale, float("nan")), mask=row_inside)
        if MODE == _CHECK:
            exceeded = tl.max((row_maximum > tl.load(effective_threshold)).to(tl.int32), axis=0)
            tl.store(counters + _FLAG, 1, mask=(exceeded != 0) & learns)

        if IN_REGISTERS:
            _store_codes(codes_row + chunk[None, :], values, slot, inverse, finite, mask, LARGEST_CODE)
        else:
            for start in range(0, columns, CHUNK):
                column = start + chunk
                part_mask = row_inside[:, None] & (column < columns)[None, :]
                part_slot = tl.load(column_slot + column, mask=column < columns, other=-1)
                part = tl.load(x_row + column[None, :], mask=part_mask, other=0.0).to(tl.float32)
                _store_codes(
                    codes_row + column[None, :], part, part_slot, inverse, finite, part_mask, LARGEST_CODE
                )

        if SLOTS > 0:
            place = tl.arange(0, SLOTS)
            used = place < count
            source = tl.load(index + place, mask=used & (place < slots), other=0)
            taken = tl.load(x_row + source[None, :], mask=row_inside[:, None] & used[None, :], other=0.0)
            target = outliers + row.to(tl.int64)[:, None] * slots + place[None, :]
            tl.store(target, taken, mask=row_inside[:, None] & (place < slots)[None, :])


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
    in_registers = power_of_two(columns) <= LARGEST_CHUNK
    chunk = power_of_two(columns) if in_registers else LONG_ROW_CHUNK
    rows_per_program = 1
    if rows >= ROWS_WORTH_SHARING:
        rows_per_program = max(1, min(4, ELEMENTS_PER_PROGRAM // chunk))
    blocks = ceil_div(rows, rows_per_program)
    programs = min(blocks, 4 * multiprocessors(matrix.device)) if mode == AGAIN else blocks
    _quantize_rows[(programs,)](
        matrix, codes, scale, outliers, index, column_slot, counters, effective_threshold, count_used,
        scratch, rows, columns, slots, matrix.stride(0), codes.stride(0),
        LARGEST_CODE=float(2 ** (bits - 1) - 1), MODE=mode, ROWS=rows_per_program, CHUNK=chunk,
        IN_REGISTERS=in_registers, SLOTS=power_of_two(slots) if slots else 0,
        num_warps=max(1, min(16, rows_per_program * chunk // 1024)), enable_fp_fusion=False,
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
