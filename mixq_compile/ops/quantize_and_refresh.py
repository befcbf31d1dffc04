"""`mixq::quantize_and_refresh`: quantization that learns, and the weights of what it learned, in one call.

A graph that is run has it in place of two operators, each of whose calls costs the host some time. No pass
sees it: graphs are lowered to it (`runtime/joined_calls.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.activation_codes import code_bits
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.ops.quantize_online import quantize_online
from mixq_compile.ops.refresh_outlier_weights import check_linears, check_readers, refresh_outlier_weights
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, QUANTIZED, STATE, Given, quantized_like, results_of
from mixq_compile.ops.traits import declare


@operator(
    "mixq::quantize_and_refresh", mutates_args=(*STATE_FIELDS, "cached_index", "outlier_weight"), tags=LAYOUT
)
def quantize_and_refresh(
    x: Tensor,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    cached_index: Sequence[Tensor],
    outlier_weight: Sequence[Tensor],
    weight_codes: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    original: Sequence[Tensor],
    format: str,
    miss: str,
    small_m: int,
    kernel: str,
    refresh_kernel: str,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_online`, then `refresh_outlier_weights` with what it returned; returns that.

    Operands are those of the two, `refresh_kernel` the second's kernel.
    """
    # Before anything is learned, which the second step would find too late.
    lists = cached_index, outlier_weight, weight_codes, weight_scale, original
    check_linears(x, index, counters, *lists)
    codes, scale, outliers, count = quantize_online._init_fn(
        x, index, column_slot, column_max, counters, effective_threshold, format, miss, small_m, kernel,
        row_mask,
    )  # fmt: skip
    refresh_outlier_weights._init_fn(codes, index, count, *lists, small_m, refresh_kernel)
    return codes, scale, outliers, count


@results_of(quantize_and_refresh)
def _(given: Given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    code_bits(given.format)
    operand_checks.QUANTIZE_ONLINE.examine_named(given)
    made = *quantized_like(given.x, given.index.shape[0]), given.index.new_empty(1)
    check_readers(Given({**given, "codes": made[0], "count": made[3]}))
    return made


declare(
    quantize_and_refresh,
    composite=True,
    results=(*QUANTIZED, "count"),
    state=STATE,
    each=("cached_index", "outlier_weight", "weight_codes", "weight_scale", "original"),
)
