"""`mixq::quantized_linear`: a linear, its activation function and the quantization for the next linear."""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.activation_codes import code_bits
from mixq_compile.ops.activation_functions import QUANTIZING, check_function
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.ops.providers import run
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, QUANTIZED, STATE, WEIGHT, Given, results_of
from mixq_compile.ops.state_access import STATES
from mixq_compile.ops.traits import declare
from mixq_compile.ops.weight_codes import ROW_ALIGNMENT, format_name


@operator("mixq::quantized_linear", mutates_args=STATE_FIELDS, tags=LAYOUT)
def quantized_linear(
    codes: Tensor,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    function: str,
    format: str,
    miss: str,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `quantize_online` returns for `function(mixed_linear(…))`, whose values never reach memory.

    codes `[..., K]` to outlier_weight `[N, C]` are the linear's operands, as `mixed_linear` takes them; the
    state, format and miss policy are those of the value `[..., N]`. Its outliers have the dtype of the
    linear's. Kernels need not round the value to that dtype before quantizing it.
    """
    operand_checks.QUANTIZED_LINEAR.check(
        codes, index, column_slot, column_max, counters, effective_threshold, scale, outliers, count,
        weight_codes, weight_scale, outlier_weight, bias,
    )  # fmt: skip
    check_function(function, QUANTIZING)
    return run(  # type: ignore[no-any-return]
        "quantized_linear", kernel, outliers, format_name(weight_codes), format,
        codes, index, column_slot, column_max, counters, effective_threshold, scale, outliers, count,
        weight_codes, weight_scale, STATES.cache(outlier_weight), bias, function, format, miss,
    )  # fmt: skip


@results_of(quantized_linear)
def _(given: Given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    code_bits(given.format)
    check_function(given.function, QUANTIZING)
    operand_checks.QUANTIZED_LINEAR.examine_named(given)
    leading, features = given.codes.shape[:-1], given.weight_codes.shape[0]
    padded = (features + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    made = given.codes.new_empty((*leading, padded))[..., :features]
    slots = given.outliers.new_empty((*leading, given.index.shape[0]))
    scale = given.codes.new_empty(leading, dtype=torch.float32)
    return made, scale, slots, given.index.new_empty(1)


declare(
    quantized_linear,
    product=True,
    source="outliers",
    rows=WEIGHT,
    results=(*QUANTIZED, "count"),
    state=STATE,
)
