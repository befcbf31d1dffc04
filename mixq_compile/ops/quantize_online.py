"""`mixq::quantize_online`: rows to integer codes, with outlier columns that are learned on the way."""

from __future__ import annotations

from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.activation_codes import code_bits
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.ops.providers import ANY_WEIGHT, run, run_with
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, QUANTIZED, STATE, Given, quantized_like, results_of
from mixq_compile.ops.traits import declare


@operator("mixq::quantize_online", mutates_args=STATE_FIELDS, tags=LAYOUT)
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
    kernel: str,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes rows with the outlier columns known so far, and learns new ones (docs/semantics.md).

    Only rows whose scale is below `TEACHING_LIMIT` are learned from, under `per_call` all finite ones.
    Like `quantize`, and returns count int32 `[1]`: how many of the outlier slots this call used.
    row_mask bool `[...]`: nothing is learned from rows where it is False, such as those that pad a batch;
    they are quantized as all others are. None: every row teaches.
    """
    operand_checks.QUANTIZE_ONLINE.check(
        x, index, column_slot, column_max, counters, effective_threshold, row_mask
    )
    if row_mask is not None:
        return run_with(  # type: ignore[no-any-return]
            {"row_mask": row_mask}, "quantize_online", kernel, x, ANY_WEIGHT, format,
            x, index, column_slot, column_max, counters, effective_threshold, format, miss, small_m,
        )  # fmt: skip
    return run(  # type: ignore[no-any-return]
        "quantize_online", kernel, x, ANY_WEIGHT, format,
        x, index, column_slot, column_max, counters, effective_threshold, format, miss, small_m,
    )  # fmt: skip


@results_of(quantize_online)
def _(given: Given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    code_bits(given.format)
    operand_checks.QUANTIZE_ONLINE.examine_named(given)
    return *quantized_like(given.x, given.index.shape[0]), given.index.new_empty(1)


declare(quantize_online, quantizes="x", results=(*QUANTIZED, "count"), state=STATE)
