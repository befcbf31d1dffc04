"""`mixq::mixed_gemm`: the two products of a quantized linear, of codes and of outliers, not yet joined."""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import ANY_ACTIVATION, run
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, Given, results_of
from mixq_compile.ops.state_access import STATES
from mixq_compile.ops.traits import declare
from mixq_compile.ops.weight_codes import format_name


@operator("mixq::mixed_gemm", mutates_args=(), tags=LAYOUT)
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
        "mixed_gemm", kernel, outliers, format_name(weight_codes), ANY_ACTIVATION,
        codes, outliers, count, weight_codes, STATES.cache(outlier_weight),
    )  # fmt: skip


@results_of(mixed_gemm)
def _(given: Given) -> tuple[Tensor, Tensor]:
    operand_checks.MIXED_GEMM.examine_named(given)
    shape = (*given.codes.shape[:-1], given.weight_codes.shape[0])
    accumulator = given.codes.new_empty(shape, dtype=torch.int32)
    return accumulator, given.codes.new_empty(shape, dtype=torch.float32)


declare(
    mixed_gemm,
    product=True,
    source="outliers",
    rows=("weight_codes", "outlier_weight"),
    results=("accumulator", "outlier_product"),
)
