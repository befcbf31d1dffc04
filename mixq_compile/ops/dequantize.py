"""`mixq::dequantize`: the two products of a quantized linear joined to its result."""

from __future__ import annotations

from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import ANY_ACTIVATION, ANY_WEIGHT, run, run_with
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, Given, results_of
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
    addend: Tensor | None = None,
) -> Tensor:
    """`accumulator * scale * weight_scale + outlier_product + bias`, in fp32, rounded once to x's dtype.

    addend `[..., N]` is added too: by kernels that have no place for it behind that rounding, with another.
    """
    operand_checks.DEQUANTIZE.check(x, accumulator, outlier_product, scale, weight_scale, bias, addend)
    if addend is not None:
        return run_with(  # type: ignore[no-any-return]
            {"addend": addend}, "dequantize", kernel, x, ANY_WEIGHT, ANY_ACTIVATION,
            x, accumulator, outlier_product, scale, weight_scale, bias,
        )  # fmt: skip
    return run(  # type: ignore[no-any-return]
        "dequantize", kernel, x, ANY_WEIGHT, ANY_ACTIVATION,
        x, accumulator, outlier_product, scale, weight_scale, bias,
    )  # fmt: skip


@results_of(dequantize)
def _(given: Given) -> Tensor:
    operand_checks.DEQUANTIZE.examine_named(given)
    return given.x.new_empty(given.accumulator.shape)  # type: ignore[no-any-return]


declare(dequantize, rows=("weight_scale", "bias"), columns=("addend",))
