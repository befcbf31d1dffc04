"""`mixq::mixed_linear`: the product of a quantized linear and its dequantization in one kernel."""

from __future__ import annotations

from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import ANY_ACTIVATION, run, run_with
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, WEIGHT, Given, results_of
from mixq_compile.ops.state_access import STATES
from mixq_compile.ops.traits import declare
from mixq_compile.ops.weight_codes import format_name


@operator("mixq::mixed_linear", mutates_args=(), tags=LAYOUT)
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
    addend: Tensor | None = None,
) -> Tensor:
    """`mixed_gemm` and `dequantize` in one kernel; at most `small_m` rows take `weight_only_linear`.

    x `[..., K]` is read only by the weight-only path; its dtype is the result's, `[..., N]`.
    addend `[..., N]` is added in fp32 before the one rounding; by kernels that have no place for it behind
    it, with another.
    """
    (operand_checks.READ_LINEAR if small_m else operand_checks.MIXED_LINEAR).check(
        x, codes, scale, outliers, count, weight_codes, weight_scale, outlier_weight, bias, addend
    )
    if addend is not None:
        return run_with(  # type: ignore[no-any-return]
            {"addend": addend}, "mixed_linear", kernel, x, format_name(weight_codes), ANY_ACTIVATION,
            x, codes, scale, outliers, count, weight_codes, weight_scale, STATES.cache(outlier_weight), bias,
            small_m,
        )  # fmt: skip
    return run(  # type: ignore[no-any-return]
        "mixed_linear", kernel, x, format_name(weight_codes), ANY_ACTIVATION,
        x, codes, scale, outliers, count, weight_codes, weight_scale, STATES.cache(outlier_weight), bias,
        small_m,
    )  # fmt: skip


@results_of(mixed_linear)
def _(given: Given) -> Tensor:
    (operand_checks.READ_LINEAR if given.small_m else operand_checks.MIXED_LINEAR).examine_named(given)
    return given.x.new_empty((*given.x.shape[:-1], given.weight_codes.shape[0]))  # type: ignore[no-any-return]


declare(mixed_linear, product=True, joins=True, rows=WEIGHT, columns=("addend",))
