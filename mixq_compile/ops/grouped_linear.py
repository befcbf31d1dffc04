"""`mixq::grouped_linear`: the product of a linear whose weight has scales in groups, or zero points."""

from __future__ import annotations

from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import KernelQuery, supporting
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, Given, results_of
from mixq_compile.ops.state_access import STATES
from mixq_compile.ops.traits import declare


@operator("mixq::grouped_linear", mutates_args=(), tags=LAYOUT)
def grouped_linear(
    codes: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    outlier_weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    weight_format: str,
    kernel: str,
) -> Tensor:
    """`scale * Σ_g weight_scale_g * Σ_g codes·(weight_codes - weight_zero) + outliers + bias + addend`.

    codes `[..., K]` int8, scale `[...]`, outliers `[..., C]` and count are what quantization returns;
    weight_codes, weight_scale and weight_zero a weight `[N, K]` in `weight_format`, such as `uint4/128`, as
    `weights.recipe.parts` has them; outlier_weight `[N, C]`; bias `[N]`; addend `[..., N]`, such as a
    low-rank part or what zero points of the activation are corrected by. Returns `[..., N]` in the outliers'
    dtype, rounded once. Raises OptionError for a text that is no format. There is no path for few rows.
    """
    fmt = TensorFormat.parse(weight_format)
    operand_checks.GROUPED_LINEAR.check(
        codes, scale, outliers, count, weight_codes, outlier_weight, bias, addend
    )
    operand_checks.examine_weight("grouped_linear", fmt, codes, weight_codes, weight_scale, weight_zero)
    query = KernelQuery("grouped_linear", outliers.device, outliers.dtype, fmt)
    return supporting(query, kernel).function(  # type: ignore[no-any-return]
        codes, scale, outliers, count, weight_codes, weight_scale, weight_zero,
        STATES.cache(outlier_weight), bias, addend, weight_format,
    )  # fmt: skip


@results_of(grouped_linear)
def _(given: Given) -> Tensor:
    operand_checks.GROUPED_LINEAR.examine_named(given)
    fmt = TensorFormat.parse(given.weight_format)
    operand_checks.examine_weight(
        "grouped_linear", fmt, given.codes, given.weight_codes, given.weight_scale, given.weight_zero
    )
    return given.outliers.new_empty((*given.codes.shape[:-1], given.weight_codes.shape[0]))  # type: ignore[no-any-return]


declare(
    grouped_linear,
    product=True,
    source="outliers",
    rows=("weight_codes", "weight_scale", "weight_zero", "outlier_weight", "bias"),
)
