"""`mixq::quantize_online`: rows to integer codes, with outlier columns that are learned on the way."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.ops.providers import run
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, QUANTIZED, STATE, quantized_like
from mixq_compile.ops.traits import declare


@operator("mixq::quantize_online", mutates_args=STATE_FIELDS, tags=LAYOUT)
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
