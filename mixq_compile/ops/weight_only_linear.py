"""`mixq::weight_only_linear`: integer weights times activations that stay in 16 or 32 bit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import run
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT
from mixq_compile.ops.traits import declare
from mixq_compile.ops.weight_codes import weight_bits


@operator("mixq::weight_only_linear", mutates_args=(), tags=LAYOUT)
def weight_only_linear(
    x: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: str,
) -> Tensor:
    """`x · (weight_codes * weight_scale)ᵀ + bias` with x in 16 or 32 bit: `[..., K] -> [..., N]`."""
    operand_checks.WEIGHT_ONLY.check(x, weight_codes, weight_scale, bias)
    return run(  # type: ignore[no-any-return]
        "weight_only_linear", kernel, x, weight_bits(weight_codes),
        x, weight_codes, weight_scale, bias,
    )  # fmt: skip


@weight_only_linear.register_fake
def _(x: Tensor, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    operand_checks.WEIGHT_ONLY.examine(x, weight_codes, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], weight_codes.shape[0]))


declare(weight_only_linear, product=True, joins=True, rows=("weight_codes", "weight_scale", "bias"))
