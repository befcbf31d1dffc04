"""`mixq::mixed_gemm`: the two products of a quantized linear, of codes and of outliers, not yet joined."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import run
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT
from mixq_compile.ops.state_access import STATES
from mixq_compile.ops.traits import declare
from mixq_compile.ops.weight_codes import weight_bits


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
