# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
"""`quantize` and `quantize_online`: row scales, codes and the extracted outlier columns in one pass.

An online call is two launches: quantize with the columns known so far, raising a flag on the device
where a row exceeds the threshold; then learning, which returns at once where the flag is down, so that the
host never has to look at it, and else learns the new columns and quantizes again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixq_compile.kernels.tl.growth import (
    EVICT,
    KEEP,
    REPLACE,
    await_growth,
    grow_state,
    growth_options,
    scratch_for,
)
from mixq_compile.kernels.tl.plan_recording import enqueue
from mixq_compile.kernels.tl.quantized_rows import ALWAYS, CHECK, FIXED, SNAPSHOT, quantize_rows
from mixq_compile.kernels.tl.toolkit import (
    PRIORITY,
    await_previous_launch,
    ceil_div,
    interpreting,
    multiprocessors,
    on_device,
    overlap,
    power_of_two,
    row_matrix,
    supports,
    tl,
    triton,
)
from mixq_compile.ops.activation_codes import largest_code
from mixq_compile.ops.outlier_state import FLAG
from mixq_compile.ops.providers import provider
from mixq_compile.ops.small_batch import is_small_batch
from mixq_compile.ops.weight_codes import aligned_empty

ELEMENTS_PER_THREAD = 8
"""Contiguous columns of a thread: 16 bytes of a 16-bit activation."""
FEW_ROWS = 512
"""Up to so many rows, more warps share each, and a program has but one or two."""
LEARNING_WARPS = 8

_FLAG, _SNAPSHOT = tl.constexpr(FLAG), tl.constexpr(SNAPSHOT)


@triton.jit(do_not_specialize=["rows"])
def _quantize(
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
    row_mask,  # [M] bool, or None
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
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        await_previous_launch()
    quantize_rows(
        x, codes, scale, outliers, index, column_slot, counters, effective_threshold, count_used, scratch,
        row_mask, rows, columns, slots, x_stride, codes_stride, LARGEST_CODE, MODE, PART, PARTS, HOLDS,
        AHEAD, SLOTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "splits"])
def _learn(
    x,
    codes,
    scale,
    outliers,
    index,
    column_slot,
    column_max,  # [C] fp32
    counters,
    effective_threshold,
    count_used,
    scratch,
    row_mask,
    rows,
    columns,
    slots,
    x_stride,
    codes_stride,
    splits,
    LARGEST_CODE: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    POLICY: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    REPEATS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        await_previous_launch()
    if tl.load(counters + _FLAG) != 0:
        grow_state(
            x, scale, index, column_slot, column_max, counters, effective_threshold, scratch,
            row_mask, rows, columns, slots, splits, x_stride, POLICY, TILE_ROWS, TILE_COLUMNS, BLOCK, SLOTS,
        )  # fmt: skip
        if REPEATS:
            await_growth(scratch)
            quantize_rows(
                x, codes, scale, outliers, index, column_slot, counters, effective_threshold, count_used,
                scratch, row_mask, rows, columns, slots, x_stride, codes_stride,
                LARGEST_CODE, _SNAPSHOT, PART, PARTS, False, False, SLOTS,
            )  # fmt: skip


class Share(NamedTuple):
    """How rows are dealt out: the warps of a program, the programs' warps on a multiprocessor, and what
    `quantize_rows` HOLDS and loads AHEAD."""

    warps: int
    resident: int
    holds: bool
    ahead: bool

    @property
    def part(self) -> int:
        """Columns that a program takes at a time."""
        return self.warps * 32 * ELEMENTS_PER_THREAD


def share_rows(rows: int, columns: int) -> Share:
    """The measured best: few rows take many warps each, many rows registers for two rows a thread."""
    if rows <= FEW_ROWS:
        warps = min(16, power_of_two(columns // (32 * ELEMENTS_PER_THREAD) + 1, at_least=2) // 2)
        return Share(warps, 32, holds=False, ahead=False)
    for warps, resident, parts in ((1, 16, 4), (2, 16, 4), (4, 16, 4), (8, 16, 4), (4, 8, 11), (16, 16, 4)):
        if columns <= parts * warps * 32 * ELEMENTS_PER_THREAD:
            return Share(warps, resident, holds=True, ahead=True)
    return Share(16, 16, holds=False, ahead=True)


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
    format: str,
    row_mask: Tensor | None = None,
) -> None:
    rows, columns = matrix.shape
    codes, scale, outliers = outputs
    slots = index.shape[0]
    share = share_rows(rows, columns)
    programs = min(rows, share.resident // share.warps * multiprocessors(matrix.device))
    enqueue(
        _quantize, (programs,),
        matrix, codes, scale, outliers, index, column_slot, counters, effective_threshold, count_used,
        scratch, row_mask, rows, columns, slots, matrix.stride(0), codes.stride(0),
        LARGEST_CODE=float(largest_code(format)), MODE=mode, PART=share.part,
        PARTS=ceil_div(columns, share.part),
        HOLDS=share.holds and rows > programs, AHEAD=share.ahead and rows > programs,
        SLOTS=power_of_two(slots) if slots else 0,
        num_warps=share.warps, enable_fp_fusion=False, **overlap(matrix),
    )  # fmt: skip


def launch_learning(
    matrix: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    count_used: Tensor,
    scratch: Tensor,
    format: str,
    miss: str,
    row_mask: Tensor | None,
) -> None:
    """Where the flag is up: learns the new columns and, unless the policy is lazy, quantizes again.

    One program a multiprocessor, because they wait for each other.
    """
    policy = {"lazy": KEEP, "per_call": REPLACE}.get(miss, EVICT)
    rows, columns = matrix.shape
    codes, scale, outliers = outputs
    part = LEARNING_WARPS * 32 * ELEMENTS_PER_THREAD
    enqueue(
        _learn, (1 if interpreting() else multiprocessors(matrix.device),),
        matrix, codes, scale, outliers, index, column_slot, column_max, counters, effective_threshold,
        count_used, scratch, row_mask, rows, columns, index.shape[0], matrix.stride(0), codes.stride(0),
        LARGEST_CODE=float(largest_code(format)), PART=part, PARTS=ceil_div(columns, part),
        REPEATS=miss != "lazy",
        num_warps=LEARNING_WARPS, enable_fp_fusion=False,
        launch_cooperative_grid=not interpreting(),
        **growth_options(rows, columns, index.shape[0], policy), **overlap(matrix),
    )  # fmt: skip


def outputs_of(x: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised codes, scale and outliers for x, in its shape."""
    leading = tuple(x.shape[:-1])
    codes = aligned_empty(leading, x.shape[-1], torch.int8, x.device)
    scale = torch.empty(leading, dtype=torch.float32, device=x.device)
    return codes, scale, torch.empty((*leading, slots), dtype=x.dtype, device=x.device)


def as_rows(outputs: tuple[Tensor, Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and outliers with one row dimension."""
    codes, scale, outliers = outputs
    return codes.view(rows, codes.shape[-1]), scale.view(rows), outliers.view(rows, outliers.shape[-1])


@provider("quantize", name="tl", priority=PRIORITY, supports=supports)
def quantize(
    x: Tensor, index: Tensor, column_slot: Tensor, count: Tensor, format: str, small_m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch; at most `small_m` rows are left unwritten, because the weight-only path reads x."""
    outputs = outputs_of(x, index.shape[0])
    matrix = row_matrix(x)
    if matrix.shape[0] and not is_small_batch(matrix, small_m):
        rows = as_rows(outputs, matrix.shape[0])
        with on_device(x):
            _launch(FIXED, matrix, rows, index, column_slot, count, count, count, count, format)
    return outputs


@provider("quantize_online", name="tl", priority=PRIORITY, supports=supports)
def quantize_online(
    x: Tensor,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    format: str,
    miss: str,
    small_m: int,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches, of which the second returns at once where no row exceeds the threshold."""
    outputs = outputs_of(x, index.shape[0])
    count_used = torch.empty_like(counters[:1])
    matrix = row_matrix(x)
    if not matrix.shape[0] or is_small_batch(matrix, small_m):
        return *outputs, count_used
    rows = as_rows(outputs, matrix.shape[0])
    state = (index, column_slot, counters, effective_threshold)
    with on_device(x):
        if miss == "static":
            _launch(SNAPSHOT, matrix, rows, *state, count_used, counters, format)
            return *outputs, count_used
        scratch = scratch_for(matrix, index.shape[0])
        mask = None if row_mask is None else row_mask.reshape(-1).contiguous()
        first = ALWAYS if miss == "per_call" else CHECK
        _launch(first, matrix, rows, *state, count_used, scratch, format, mask)
        launch_learning(
            matrix, rows, index, column_slot, column_max, counters, effective_threshold, count_used, scratch,
            format, miss, mask,
        )  # fmt: skip
    return *outputs, count_used
