"""Circuits that multiply in FP16, with weights that are dequantized as they stream in."""

from __future__ import annotations

import math
from typing import Any

from mixq_compile.area.assumptions import Assumptions
from mixq_compile.area.checks import divides, whole_number
from mixq_compile.area.components import float_dot, units
from mixq_compile.area.layout import Stage, checked_product, estimate
from mixq_compile.area.report import AreaReport

NAMES = ("X_shape", "W_shape")
SCALE_BITS = 16


def float_circuit(scheme: str, x_shape: Any, w_shape: Any, assumptions: Assumptions) -> AreaReport:
    """A plain product in FP16."""
    product = checked_product(x_shape, w_shape, assumptions, NAMES)
    return estimate(
        scheme, product, _main(assumptions), (), assumptions,
        multiplications=product.multiplications, settings={},
    )  # fmt: skip


def weight_only_circuit(
    scheme: str, x_shape: Any, w_shape: Any, num_groups: Any, assumptions: Assumptions, *, bits: int
) -> AreaReport:
    """A product in FP16 whose weights are codes: each is cast and multiplied with its group's scalar first.

    The scalars in use are held in registers, with zero points if those are assumed. Groups divide the
    columns of W, or its rows: see `Assumptions.groups`.
    """
    product = checked_product(x_shape, w_shape, assumptions, NAMES)
    by_output = assumptions.groups == "outputs"
    grouped = product.out_features if by_output else product.in_features
    count = whole_number("num_groups", num_groups, least=1, most=grouped)
    divides("num_groups", count, f"W_shape[{1 if by_output else 0}]", grouped)
    lanes = assumptions.lanes_k
    in_use = 1 if by_output else math.ceil(lanes / (grouped // count))
    scalar_bits = SCALE_BITS + (bits if assumptions.zero_point else 0)
    dequantize = Stage(
        "dequantize",
        lambda width: (
            units("dequant", width, n=bits, asymmetric=int(assumptions.zero_point))
            + units("reg", in_use * assumptions.lanes_n, n=scalar_bits)
        ),
        product.in_features * product.out_features,
        lanes,
        per="column",
    )
    return estimate(
        scheme, product, _main(assumptions), (dequantize,), assumptions,
        multiplications=product.multiplications + product.in_features * product.out_features,
        settings={"num_groups": count},
    )  # fmt: skip


def _main(assumptions: Assumptions) -> Any:
    return float_dot(assumptions.lanes_k, accumulator=assumptions.float_accumulator)
