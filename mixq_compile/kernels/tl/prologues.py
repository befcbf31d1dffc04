# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
"""`norm_quantize` and `activation_quantize`: a value and the first pass of its quantization in one launch.

A row is read once, its value stays in registers, is rounded to 16 bit, written (the weight-only path and
a miss read it) and quantized from there. What follows on a miss is that of `quantize_online`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.kernels.tl import quantization
from mixq_compile.kernels.tl.growth import GROWN, TICKET, scratch_for
from mixq_compile.kernels.tl.quantized_rows import (
    ALWAYS,
    CHECK,
    SNAPSHOT,
    code_of,
    is_inner,
    larger_or_nan,
    scales_of,
)
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

RMS, LAYER, SILU, GELU, GELU_TANH = range(5)
PRODUCERS = {"rms": RMS, "layer": LAYER, "silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}

_RMS, _LAYER, _SILU, _GELU = (tl.constexpr(number) for number in (RMS, LAYER, SILU, GELU))
_CHECK, _ALWAYS = tl.constexpr(CHECK), tl.constexpr(ALWAYS)
_COUNT, _FLAG, _FROZEN = (tl.constexpr(place) for place in (COUNT, FLAG, FROZEN))
_TICKET, _GROWN = tl.constexpr(TICKET), tl.constexpr(GROWN)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _activated(x, PRODUCER: tl.constexpr):
    """SiLU or GELU of fp32 numbers."""
    if PRODUCER == _SILU:
        return tl.div_rn(x, 1.0 + tl.exp(-x))
    if PRODUCER == _GELU:
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * _sigmoid(2.0 * inner)


@triton.jit(do_not_specialize=["rows"])
def _produce_rows(
    x,  # [M, K]
    other,  # the norm's weight [K], or the factor [M, K]
    bias,  # [K]
    y,  # [M, K]
    codes,  # [M, K] int8
    scale,  # [M] fp32
    outliers,  # [M, C]
    index,  # [C] int32
    column_slot,  # [K] int32
    counters,  # [4] int32
    effective_threshold,  # [1] fp32
    count_used,  # [1] int32
    scratch,  # int32, see growth
    epsilon,
    rows,
    columns,
    slots,
    x_stride,
    other_stride,
    codes_stride,
    LARGEST_CODE: tl.constexpr,
    MODE: tl.constexpr,
    QUANTIZES: tl.constexpr,
    PRODUCER: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        await_previous_launch()
    program = tl.program_id(0)
    dtype = y.dtype.element_ty
    if QUANTIZES:
        count = tl.load(counters + _COUNT)
        tl.store(count_used, count, mask=program == 0)
        if (MODE == _CHECK) | (MODE == _ALWAYS):
            learns = tl.load(counters + _FROZEN) == 0
            tl.store(scratch + _TICKET, 0, mask=program == 0)
            tl.store(scratch + _GROWN, 0, mask=program == 0)
        if MODE == _CHECK:
            threshold = tl.load(effective_threshold)
        if MODE == _ALWAYS:
            tl.store(counters + _FLAG, 1, mask=(program == 0) & learns)
        if SLOTS > 0:
            place = tl.arange(0, SLOTS)
            outlier_column = tl.load(index + place, mask=(place < count) & (place < slots), other=0)

    for row in range(program, rows, tl.num_programs(0)):
        wide_row = tl.cast(row, tl.int64)
        x_row = x + wide_row * x_stride
        y_row = y + wide_row * columns
        read = ()
        total = tl.zeros((PART,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            column = part * PART + tl.arange(0, PART)
            values = tl.load(x_row + column, mask=column < columns, other=0.0).to(tl.float32)
            if PRODUCER == _RMS:
                total += values * values
            elif PRODUCER == _LAYER:
                total += values
            read = read + (values,)  # noqa: RUF005
        if PRODUCER == _LAYER:
            mean = tl.div_rn(tl.sum(total, axis=0), tl.cast(columns, tl.float32))
            total = tl.zeros((PART,), dtype=tl.float32)
            for part in tl.static_range(PARTS):
                column = part * PART + tl.arange(0, PART)
                centred = tl.where(column < columns, read[part] - mean, 0.0)
                total += centred * centred
        if (PRODUCER == _RMS) | (PRODUCER == _LAYER):
            variance = tl.div_rn(tl.sum(total, axis=0), tl.cast(columns, tl.float32))
            inverse_deviation = tl.div_rn(1.0, tl.sqrt_rn(variance + epsilon))

        parts = ()
        largest = tl.zeros((PART,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            column = part * PART + tl.arange(0, PART)
            inside = column < columns
            if PRODUCER == _RMS:
                weight = tl.load(other + column, mask=inside, other=0.0).to(tl.float32)
                result = (read[part] * inverse_deviation).to(dtype).to(tl.float32) * weight
            elif PRODUCER == _LAYER:
                weight = tl.load(other + column, mask=inside, other=0.0).to(tl.float32)
                result = (read[part] - mean) * inverse_deviation * weight
                if HAS_BIAS:
                    result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            else:
                result = _activated(read[part], PRODUCER)
                if HAS_FACTOR:
                    factor = tl.load(other + wide_row * other_stride + column, mask=inside, other=0.0)
                    result = result.to(dtype).to(tl.float32) * factor.to(tl.float32)
            rounded_result = result.to(dtype)
            tl.store(y_row + column, rounded_result, mask=inside)
            if QUANTIZES:
                # As in the quantization alone: outlier columns become 0, or NaN where they are not finite.
                inner = rounded_result.to(tl.float32) * is_inner(column_slot, column, columns)
                inner = tl.where(inside, inner, 0.0)
                largest = larger_or_nan(largest, tl.abs(inner))
                parts = parts + (inner,)  # noqa: RUF005

        if QUANTIZES:
            largest_of_row = tl.reduce(largest, 0, larger_or_nan)
            finite, row_maximum, row_scale, inverse = scales_of(largest_of_row, LARGEST_CODE)
            tl.store(scale + row, row_scale)
            if MODE == _CHECK:
                tl.store(counters + _FLAG, 1, mask=(row_maximum > threshold) & learns)
            for part in tl.static_range(PARTS):
                column = part * PART + tl.arange(0, PART)
                code = tl.where(finite, code_of(parts[part], inverse), 0).to(tl.int8)
                tl.store(codes + wide_row * codes_stride + column, code, mask=column < columns)
            if SLOTS > 0:
                # Other threads of the program wrote these columns of y.
                tl.debug_barrier()
                taken = tl.load(y_row + outlier_column, mask=place < count, other=0.0)
                tl.store(outliers + wide_row * slots + place, taken, mask=place < slots)


def _run(
    x: Tensor,
    other: Tensor | None,
    bias: Tensor | None,
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    epsilon: float,
    producer: str,
    bits: int,
    miss: str,
    small_m: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One launch where no row exceeds the threshold but two that return at once."""
    index, column_slot, column_max, counters, effective_threshold = state
    slots = index.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    outputs, count_used = quantization.outputs_of(x, slots), torch.empty_like(counters[:1])
    matrix = row_matrix(x)
    rows, columns = matrix.shape
    if not rows:
        return y, *outputs, count_used
    quantizes = rows > small_m
    value = y.view(rows, columns)
    codes, scale, outliers = as_rows = quantization.as_rows(outputs, rows)
    scratch = scratch_for(value, slots) if quantizes else counters
    mode = {"static": SNAPSHOT, "per_call": ALWAYS}.get(miss, CHECK)
    warps = quantization.warps_of(rows, columns)
    part = warps * 32 * quantization.ELEMENTS_PER_THREAD
    programs = min(rows, quantization.WARPS_PER_MULTIPROCESSOR // warps * multiprocessors(x.device))
    second = other if other is None or other.dim() == 1 else row_matrix(other)
    with on_device(x):
        _produce_rows[(programs,)](
            matrix, second, bias, value, codes, scale, outliers, index, column_slot, counters,
            effective_threshold, count_used, scratch, epsilon, rows, columns, slots, matrix.stride(0),
            0 if second is None else second.stride(0), codes.stride(0),
            LARGEST_CODE=quantization.largest_code(bits), MODE=mode, QUANTIZES=quantizes,
            PRODUCER=PRODUCERS[producer], HAS_FACTOR=second is not None, HAS_BIAS=bias is not None,
            PART=part, PARTS=ceil_div(columns, part), SLOTS=power_of_two(slots) if slots else 0,
            num_warps=warps, enable_fp_fusion=False, **overlap(matrix),
        )  # fmt: skip
        if quantizes and mode != SNAPSHOT:
            quantization.launch_learning(
                value, as_rows, index, column_slot, column_max, counters, effective_threshold, count_used,
                scratch, bits, miss,
            )  # fmt: skip
    return y, *outputs, count_used


@provider("norm_quantize", name="tl", priority=PRIORITY, supports=supports)
def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    epsilon: float,
    norm: str,
    bits: int,
    miss: str,
    small_m: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The norm's sums are taken in another order than torch's: y may differ from torch's in its last bit."""
    state = (index, column_slot, column_max, counters, effective_threshold)
    return _run(x, weight.contiguous(), bias, state, epsilon, norm, bits, miss, small_m)


@provider("activation_quantize", name="tl", priority=PRIORITY, supports=supports)
def activation_quantize(
    x: Tensor,
    factor: Tensor | None,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    function: str,
    bits: int,
    miss: str,
    small_m: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The factor's rows may lie apart, as parts of a merged product do."""
    state = (index, column_slot, column_max, counters, effective_threshold)
    return _run(x, factor, None, state, 0.0, function, bits, miss, small_m)
