"""`mixq::dequantize`: the two products of a quantized linear joined to its result."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import run
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT
from mixq_compile.ops.traits import declare


@operator("mixq::dequantize", mutates_args=(), tags=LAYOUT)
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
