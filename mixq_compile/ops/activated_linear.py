"""`mixq::activated_linear`: a linear and the activation function of its result, with or without a gate."""

from __future__ import annotations

from torch import Tensor

from mixq_compile.errors import OperandError
from mixq_compile.ops import operand_checks
from mixq_compile.ops.activation_functions import ACTIVATED, check_function
from mixq_compile.ops.providers import ANY_ACTIVATION, run
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, WEIGHT, Given, results_of
from mixq_compile.ops.state_access import STATES
from mixq_compile.ops.traits import declare
from mixq_compile.ops.weight_codes import format_name

_LINEAR = operand_checks.Operands("activated_linear", x="float * _", **operand_checks.PRODUCT)
_READ_LINEAR = operand_checks.Operands("activated_linear", x="float * K", **operand_checks.PRODUCT)


def _check_halves(weight_codes: Tensor, gated: bool) -> None:
    """Raises OperandError where a gated linear has no two halves."""
    if gated and weight_codes.shape[0] % 2:
        raise OperandError(
            f"mixq::activated_linear: weight_codes has {weight_codes.shape[0]} rows: a gated linear must "
            "have an even number, those of the gates and then those of the values."
        )


@operator("mixq::activated_linear", mutates_args=(), tags=LAYOUT)
def activated_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    function: str,
    gated: bool,
    small_m: int,
    kernel: str,
) -> Tensor:
    """`function(y)` for y = `mixed_linear(…)`; where gated `function(gates) * values`, the two halves of y.

    All but function and gated is as in `mixed_linear`. Returns `[..., N]`, where gated `[..., N / 2]`, in x's
    dtype: computed in fp32 and rounded once, but at most `small_m` rows round y too.
    """
    (_READ_LINEAR if small_m else _LINEAR).check(
        x, codes, scale, outliers, count, weight_codes, weight_scale, outlier_weight, bias
    )
    check_function(function, ACTIVATED)
    _check_halves(weight_codes, gated)
    return run(  # type: ignore[no-any-return]
        "activated_linear", kernel, x, format_name(weight_codes), ANY_ACTIVATION,
        x, codes, scale, outliers, count, weight_codes, weight_scale, STATES.cache(outlier_weight), bias,
        function, gated, small_m,
    )  # fmt: skip


@results_of(activated_linear)
def _(given: Given) -> Tensor:
    (_READ_LINEAR if given.small_m else _LINEAR).examine_named(given)
    check_function(given.function, ACTIVATED)
    _check_halves(given.weight_codes, given.gated)
    features = given.weight_codes.shape[0]
    return given.x.new_empty((*given.x.shape[:-1], features // 2 if given.gated else features))  # type: ignore[no-any-return]


declare(activated_linear, product=True, rows=WEIGHT)
