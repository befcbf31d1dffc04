"""The `mixq::` operators: schema and shapes. What they compute is `kernels/ref`, the specification.

M rows (all leading dimensions together), K = in_features, N = out_features, C outlier slots. All
operators are functional, except that the online ones change the outlier state and
`refresh_outlier_weights` its caches. `count` is int32 and its first element counts the outlier slots
in use, so that `OutlierState.counters` can stand for it. The last argument, `kernel`, names a provider.
Each raises OperandError where shapes, dtypes or devices of its tensors do not fit each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mixq_compile.errors import OperandError
from mixq_compile.ops import operand_checks
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.ops.providers import run
from mixq_compile.ops.state_access import STATES
from mixq_compile.ops.traits import declare
from mixq_compile.ops.weight_codes import ROW_ALIGNMENT, weight_bits

LAYOUT = (torch.Tag.flexible_layout,)
"""Kernels take inputs of any strides; without this tag Inductor copies an input for each of its readers."""

QUANTIZED = ("codes", "scale", "outliers")
"""What quantization returns; where it learns, `count` too."""
STATE = {name: name for name in STATE_FIELDS}
"""The operands of an operator that takes a whole outlier state."""
WEIGHT = ("weight_codes", "weight_scale", "outlier_weight", "bias")
"""The operands of a mixed-precision product that have a row for each output."""


def _codes_like(x: Tensor) -> Tensor:
    padded = (x.shape[-1] + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    return x.new_empty((*x.shape[:-1], padded), dtype=torch.int8)[..., : x.shape[-1]]


def quantized_like(x: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[..., K]`, scale `[...]` and outliers `[..., C]` of x, of which only the shapes count."""
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return _codes_like(x), scale, x.new_empty((*x.shape[:-1], capacity))


@torch.library.custom_op("mixq::quantize", mutates_args=(), tags=LAYOUT)
def quantize(
    x: Tensor,
    index: Tensor,
    column_slot: Tensor,
    count: Tensor,
    bits: int,
    small_m: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes rows with fixed outlier columns.

    x `[..., K]`; index `[C]`, column_slot `[K]`, count int32 (C = 0: no outliers).
    Returns codes int8 `[..., K]`, scale fp32 `[...]`, outliers `[..., C]` in x's dtype.
    """
    operand_checks.QUANTIZE.check(x, index, column_slot, count)
    return run("quantize", kernel, x, 8, x, index, column_slot, count, bits, small_m)  # type: ignore[no-any-return]


@quantize.register_fake
def _(
    x: Tensor, index: Tensor, column_slot: Tensor, count: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    operand_checks.QUANTIZE.examine(x, index, column_slot, count)
    return quantized_like(x, index.shape[0])


declare(
    quantize,
    quantizes="x",
    results=QUANTIZED,
    state={"index": "index", "column_slot": "column_slot", "count": "counters"},
)


@torch.library.custom_op("mixq::quantize_online", mutates_args=STATE_FIELDS, tags=LAYOUT)
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
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes rows with the outlier columns known so far, and learns new ones (docs/semantics.md).

    Only rows whose scale is below `TEACHING_LIMIT` are learned from, under `per_call` all finite ones.
    Like `quantize`, and returns count int32 `[1]`: how many of the outlier slots this call used.
    """
    operand_checks.QUANTIZE_ONLINE.check(x, index, column_slot, column_max, counters, effective_threshold)
    return run(  # type: ignore[no-any-return]
        "quantize_online", kernel, x, 8,
        x, index, column_slot, column_max, counters, effective_threshold, bits, miss, small_m,
    )  # fmt: skip


@quantize_online.register_fake
def _(
    x: Tensor,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operand_checks.QUANTIZE_ONLINE.examine(x, index, column_slot, column_max, counters, effective_threshold)
    return *quantized_like(x, index.shape[0]), index.new_empty(1)


declare(quantize_online, quantizes="x", results=(*QUANTIZED, "count"), state=STATE)


@torch.library.custom_op(
    "mixq::refresh_outlier_weights", mutates_args=("cached_index", "outlier_weight"), tags=LAYOUT
)
def refresh_outlier_weights(
    codes: Tensor,
    index: Tensor,
    count: Tensor,
    cached_index: Sequence[Tensor],
    outlier_weight: Sequence[Tensor],
    weight_codes: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    original: Sequence[Tensor],
    small_m: int,
    kernel: str,
) -> None:
    """Fetches the columns of slots below `count` whose `cached_index` differs from `index`.

    For each linear that reads one quantization point: cached_index `[C]` int32 (-1 empty),
    outlier_weight `[N, C]`, weight_codes `[N, K]`, weight_scale `[N]`, and original: the 16-bit
    weight `[N, K]`, or an empty tensor where only the codes are at hand. Linears that follow each other
    may have one outlier_weight `[N_1 + N_2, C]`. Slots from `count` to the next multiple of 64 are zero.
    Does nothing where codes have at most `small_m` rows.
    """
    if weight_codes:
        with STATES.fetching:
            index, cached_index, outlier_weight = STATES.own_caches(index, cached_index, outlier_weight)
            held = _rows_of_each(outlier_weight, weight_codes)
            for each in _readers(cached_index, held, weight_codes, weight_scale, original):
                operand_checks.REFRESH.check(codes, index, count, *each)
            run(
                "refresh_outlier_weights", kernel, outlier_weight[0], 8,
                codes, index, count, cached_index, held, weight_codes, weight_scale, original, small_m,
            )  # fmt: skip


def _rows_of_each(outlier_weight: Sequence[Tensor], weight_codes: Sequence[Tensor]) -> Sequence[Tensor]:
    """The outlier weight `[N, C]` of each linear, where some hold the rows of several."""
    if len(outlier_weight) == len(weight_codes):
        return outlier_weight
    held_rows = sum(held.shape[0] for held in outlier_weight)
    wanted_rows = sum(codes.shape[0] for codes in weight_codes)
    if held_rows != wanted_rows:
        raise OperandError(
            f"mixq::refresh_outlier_weights: outlier_weight has {held_rows} rows in all, and weight_codes "
            f"{wanted_rows}: both must be alike."
        )
    rows = iter([codes.shape[0] for codes in weight_codes])
    parts = []
    for held in outlier_weight:
        start = 0
        while start < held.shape[0]:
            parts.append(held.narrow(0, start, next(rows)))
            start += parts[-1].shape[0]
    return parts


def _readers(*lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """cached_index, outlier weight, codes, scale and original of each linear."""
    lengths = [len(each) for each in lists]
    if len(set(lengths)) > 1:
        raise OperandError(
            "mixq::refresh_outlier_weights: cached_index, outlier_weight, weight_codes, weight_scale and "
            f"original describe {lengths} linears: they must be of the same ones."
        )
    return zip(*lists, strict=True)


@refresh_outlier_weights.register_fake
def _(
    codes: Tensor,
    index: Tensor,
    count: Tensor,
    cached_index: Sequence[Tensor],
    outlier_weight: Sequence[Tensor],
    weight_codes: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    original: Sequence[Tensor],
    *others: Any,
) -> None:
    held = _rows_of_each(outlier_weight, weight_codes)
    for each in _readers(cached_index, held, weight_codes, weight_scale, original):
        operand_checks.REFRESH.examine(codes, index, count, *each)


declare(
    refresh_outlier_weights,
    source="outlier_weight",
    state={"index": "index"},
    each=("cached_index", "outlier_weight", "weight_codes", "weight_scale", "original"),
)


@torch.library.custom_op("mixq::mixed_gemm", mutates_args=(), tags=LAYOUT)
def mixed_gemm(
    codes: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    outlier_weight: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """The integer product int32 `[..., N]` and the outlier product fp32 `[..., N]`, not yet joined."""
    operand_checks.MIXED_GEMM.check(codes, outliers, count, weight_codes, outlier_weight)
    return run(  # type: ignore[no-any-return]
        "mixed_gemm", kernel, outliers, weight_bits(weight_codes),
        codes, outliers, count, weight_codes, STATES.cache(outlier_weight),
    )  # fmt: skip


@mixed_gemm.register_fake
def _(
    codes: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    outlier_weight: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    operand_checks.MIXED_GEMM.examine(codes, outliers, count, weight_codes, outlier_weight)
    shape = (*codes.shape[:-1], weight_codes.shape[0])
    accumulator = codes.new_empty(shape, dtype=torch.int32)
    return accumulator, codes.new_empty(shape, dtype=torch.float32)


declare(
    mixed_gemm,
    product=True,
    source="outliers",
    rows=("weight_codes", "outlier_weight"),
    results=("accumulator", "outlier_product"),
)


@torch.library.custom_op("mixq::dequantize", mutates_args=(), tags=LAYOUT)
def dequantize(
    x: Tensor,
    accumulator: Tensor,
    outlier_product: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: str,
) -> Tensor:
    """`accumulator * scale * weight_scale + outlier_product + bias`, in fp32, rounded once to x's dtype."""
    operand_checks.DEQUANTIZE.check(x, accumulator, outlier_product, scale, weight_scale, bias)
    return run(  # type: ignore[no-any-return]
        "dequantize", kernel, x, 8,
        x, accumulator, outlier_product, scale, weight_scale, bias,
    )  # fmt: skip


@dequantize.register_fake
def _(
    x: Tensor,
    accumulator: Tensor,
    outlier_product: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *others: Any,
) -> Tensor:
    operand_checks.DEQUANTIZE.examine(x, accumulator, outlier_product, scale, weight_scale, bias)
    return x.new_empty(accumulator.shape)


declare(dequantize, rows=("weight_scale", "bias"))


@torch.library.custom_op("mixq::mixed_linear", mutates_args=(), tags=LAYOUT)
def mixed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    small_m: int,
    kernel: str,
) -> Tensor:
    """`mixed_gemm` and `dequantize` in one kernel; at most `small_m` rows take `weight_only_linear`.

    x `[..., K]` is read only by the weight-only path; its dtype is the result's, `[..., N]`.
    """
    (operand_checks.READ_LINEAR if small_m else operand_checks.MIXED_LINEAR).check(
        x, codes, scale, outliers, count, weight_codes, weight_scale, outlier_weight, bias
    )
    return run(  # type: ignore[no-any-return]
        "mixed_linear", kernel, x, weight_bits(weight_codes),
        x, codes, scale, outliers, count, weight_codes, weight_scale, STATES.cache(outlier_weight), bias,
        small_m,
    )  # fmt: skip


@mixed_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    small_m: int,
    kernel: str,
) -> Tensor:
    (operand_checks.READ_LINEAR if small_m else operand_checks.MIXED_LINEAR).examine(
        x, codes, scale, outliers, count, weight_codes, weight_scale, outlier_weight, bias
    )
    return x.new_empty((*x.shape[:-1], weight_codes.shape[0]))


declare(mixed_linear, product=True, joins=True, rows=WEIGHT)


@torch.library.custom_op("mixq::weight_only_linear", mutates_args=(), tags=LAYOUT)
def weight_only_linear(
    x: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: str,
) -> Tensor:
    """`x · (weight_codes * weight_scale)ᵀ + bias` with x in 16 or 32 bit: `[..., K] -> [..., N]`."""
    operand_checks.WEIGHT_ONLY.check(x, weight_codes, weight_scale, bias)
    return run(  # type: ignore[no-any-return]
        "weight_only_linear", kernel, x, weight_bits(weight_codes),
        x, weight_codes, weight_scale, bias,
    )  # fmt: skip


@weight_only_linear.register_fake
def _(x: Tensor, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    operand_checks.WEIGHT_ONLY.examine(x, weight_codes, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], weight_codes.shape[0]))


declare(weight_only_linear, product=True, joins=True, rows=("weight_codes", "weight_scale", "bias"))
