"""Circuits of LQER: a product with weights of few bits, and one of low rank that makes up for their error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mixq_compile.area.assumptions import Assumptions
from mixq_compile.area.checks import equal, matrix, whole_number
from mixq_compile.area.components import Component, accumulator_bits, fixed_dot, mxint_dot, units
from mixq_compile.area.layout import Stage, checked_product, depth_of, estimate, fixed_width
from mixq_compile.area.report import AreaReport


def low_rank_circuit(
    scheme: str,
    shapes: tuple[Any, Any, Any, Any],
    assumptions: Assumptions,
    *,
    low_bits: int,
    high_bits: int,
    blocks: bool,
) -> AreaReport:
    """Xh·Wl + (Xh·Ah)·Bh from the four shapes; with `blocks` every number is MXINT, else fixed point.

    X, A and B have `high_bits` bits, W has `low_bits`. In fixed point X arrives in its format, and Xh·Ah is
    rounded to it; in MXINT both are cast. Both products of one output meet in one adder for each main dot
    product, which aligns them first in MXINT.
    """
    x_shape, w_shape, a_shape, b_shape = shapes
    product = checked_product(x_shape, w_shape, assumptions, ("Xh_shape", "Wl_shape"))
    in_features, out_features = product.in_features, product.out_features
    a_rows, a_rank = matrix("Ah_shape", a_shape)
    b_rank, b_columns = matrix("Bh_shape", b_shape)
    equal("Ah_shape[0]", a_rows, "Wl_shape[0]", in_features)
    equal("Bh_shape[1]", b_columns, "Wl_shape[1]", out_features)
    equal("Ah_shape[1]", a_rank, "Bh_shape[0]", b_rank)
    smaller = min(in_features, out_features)
    rank = whole_number(
        "the rank, Ah_shape[1]", a_rank, least=1, most=smaller, why="no more than min(in, out)"
    )
    lanes, fixed = assumptions.lanes_k, fixed_width(assumptions)
    across = min(lanes, rank)
    depth, rank_depth = depth_of(assumptions, in_features), depth_of(assumptions, rank)
    dot = mxint_dot if blocks else fixed_dot
    sums = (
        accumulator_bits(low_bits, high_bits, depth),
        accumulator_bits(high_bits, high_bits, rank_depth),
    )
    merged = fixed or max(sums)

    def high_dot(products: int) -> Callable[[int], Component]:
        return lambda width: dot(width, high_bits, high_bits, products, accumulator=fixed)

    def cast(width: int) -> Component:
        if blocks:
            return units("mxint_cast", n=high_bits, lanes=width)
        return units("add", width, n=high_bits)

    stages = [
        Stage("low_rank_a", high_dot(depth), in_features * rank, lanes, per="row"),
        Stage("cast_xa", cast, rank, across, per="row"),
        Stage("low_rank_b", high_dot(rank_depth), rank * out_features, across),
        Stage(
            "merge",
            lambda width: units("mxint_accumulate" if blocks else "add", width, n=merged),
            out_features,
            1,
            foldable=False,
        ),
    ]
    if blocks:
        stages.insert(0, Stage("cast_x", cast, in_features, lanes, per="row"))
    return estimate(
        scheme, product, dot(lanes, low_bits, high_bits, depth, accumulator=fixed), stages, assumptions,
        multiplications=product.multiplications + product.rows * rank * (in_features + out_features),
        settings={"rank": rank},
    )  # fmt: skip
