"""`mixq::mixed_linear`: the product of a quantized linear and its dequantization in one kernel."""

from __future__ import annotations

from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import run
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, WEIGHT
from mixq_compile.ops.state_access import STATES
from mixq_compile.ops.traits import declare
from mixq_compile.ops.weight_codes import weight_bits


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
