"""`mixq::weight_only_linear`: integer weights times activations that stay in 16 or 32 bit."""

from __future__ import annotations

from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import ANY_ACTIVATION, run, run_with
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, Given, results_of
from mixq_compile.ops.traits import declare
from mixq_compile.ops.weight_codes import format_name


@operator("mixq::weight_only_linear", mutates_args=(), tags=LAYOUT)
def weight_only_linear(
    x: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: str,
    addend: Tensor | None = None,
    weight_zero: Tensor | None = None,
    weight_format: str = "",
) -> Tensor:
    """`x · ((weight_codes - weight_zero) * weight_scale)ᵀ + bias + addend`: `[..., K] -> [..., N]`.

    x in 16 or 32 bit. Without a weight_format codes are int8 `[N, K]` or packed 4-bit ones, weight_scale is
    fp32 `[N]` and there is no weight_zero. A weight_format such as `uint4/128` says how they lie: codes
    `[N, ceil(K * bits / 8)]`, scales `[N]` or in groups `[N, G]`, for codes that count from 0 weight_zero
    uint8 of the scales' shape. addend `[..., N]` is added in fp32 before the one rounding; by kernels that
    have no place for it behind it, with another. Raises OptionError for a text that is no format,
    KernelError for a format that no kernel computes with.
    """
    weight_format = _told(weight_codes, weight_format)
    if weight_format or weight_zero is not None:
        operand_checks.FORMATTED_WEIGHT_ONLY.check(x, weight_codes, bias, addend)
        _check_format(x, weight_codes, weight_scale, weight_zero, weight_format)
        given = {"addend": addend, "weight_zero": weight_zero, "weight_format": weight_format}
        return run_with(  # type: ignore[no-any-return]
            {name: value for name, value in given.items() if value is not None},
            "weight_only_linear", kernel, x, weight_format, ANY_ACTIVATION,
            x, weight_codes, weight_scale, bias,
        )  # fmt: skip
    operand_checks.WEIGHT_ONLY.check(x, weight_codes, weight_scale, bias, addend)
    if addend is not None:
        return run_with(  # type: ignore[no-any-return]
            {"addend": addend}, "weight_only_linear", kernel, x, format_name(weight_codes), ANY_ACTIVATION,
            x, weight_codes, weight_scale, bias,
        )  # fmt: skip
    return run(  # type: ignore[no-any-return]
        "weight_only_linear", kernel, x, format_name(weight_codes), ANY_ACTIVATION,
        x, weight_codes, weight_scale, bias,
    )  # fmt: skip


def _told(weight_codes: Tensor, weight_format: str) -> str:
    """The format, where the codes' dtype does not tell it."""
    return weight_format if weight_format and weight_format != format_name(weight_codes) else ""


def _check_format(
    x: Tensor, weight_codes: Tensor, weight_scale: Tensor, weight_zero: Tensor | None, weight_format: str
) -> None:
    """Raises OperandError or OptionError where a weight does not lie as its format says."""
    weight = TensorFormat.parse(weight_format or format_name(weight_codes))
    operand_checks.examine_weight("weight_only_linear", weight, x, weight_codes, weight_scale, weight_zero)


@results_of(weight_only_linear)
def _(given: Given) -> Tensor:
    weight_format = _told(given.weight_codes, given.weight_format)
    if weight_format or given.weight_zero is not None:
        operand_checks.FORMATTED_WEIGHT_ONLY.examine_named(given)
        _check_format(given.x, given.weight_codes, given.weight_scale, given.weight_zero, weight_format)
    else:
        operand_checks.WEIGHT_ONLY.examine_named(given)
    return given.x.new_empty((*given.x.shape[:-1], given.weight_codes.shape[0]))  # type: ignore[no-any-return]


declare(
    weight_only_linear,
    product=True,
    joins=True,
    rows=("weight_codes", "weight_scale", "bias", "weight_zero"),
    columns=("addend",),
)
