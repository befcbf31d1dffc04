"""Circuits that multiply integers, with some columns of X in FP16 beside them."""

from __future__ import annotations

from typing import Any

from mixq_compile.area.assumptions import Assumptions
from mixq_compile.area.checks import divides, whole_number
from mixq_compile.area.components import (
    accumulator_bits,
    fixed_dot,
    float_dot,
    rescale,
    units,
)
from mixq_compile.area.layout import Stage, checked_product, depth_of, estimate, fixed_width
from mixq_compile.area.report import AreaReport

NAMES = ("X_shape", "W_shape")


def mixed_circuit(
    scheme: str,
    x_shape: Any,
    w_shape: Any,
    columns: Any,
    assumptions: Assumptions,
    *,
    weight_bits: int,
    activation_bits: int,
    stores_codes: bool = True,
    finds_columns: bool = True,
    asymmetric_activation: bool = False,
) -> AreaReport:
    """An integer product, and a product in FP16 of `columns` columns of X, gathered into one result.

    X is quantized while it streams in; so is W where codes are not stored, if that is assumed. With
    `finds_columns` a comparison of each element scatters it to one product or the other; else the columns'
    places are fixed. With `asymmetric_activation` a zero point is subtracted from X, and its product with
    the weight's sums from the result. Without columns there is neither scattering nor gathering: the sums
    are cast to FP16 and scaled.
    """
    product = checked_product(x_shape, w_shape, assumptions, NAMES)
    in_features, out_features = product.in_features, product.out_features
    count = whole_number("num_high_precision_cols", columns, least=0, most=in_features)
    lanes = assumptions.lanes_k
    depth = depth_of(assumptions, in_features)
    main = fixed_dot(lanes, weight_bits, activation_bits, depth, accumulator=fixed_width(assumptions))
    total = fixed_width(assumptions) or accumulator_bits(weight_bits, activation_bits, depth)
    quantize = Stage(
        "quantize_x",
        lambda width: (
            units("quant", width, n=activation_bits)
            + units("fp16_add", width if asymmetric_activation else 0)
        ),
        in_features,
        lanes,
        per="row",
    )
    stages = [quantize]
    multiplications = product.multiplications + product.rows * (in_features + out_features)
    if not stores_codes and assumptions.casts_weight:
        stages.append(
            Stage(
                "quantize_w",
                lambda width: units("quant", width, n=weight_bits),
                in_features * out_features,
                lanes,
                per="column",
            )
        )
        multiplications += in_features * out_features
    if count and finds_columns:
        stages.append(
            Stage("scatter", lambda width: units("compare_demux", width), in_features, lanes, per="row")
        )
    if count:
        stages.append(
            Stage(
                "high_precision",
                lambda width: float_dot(width, accumulator=assumptions.float_accumulator),
                count * out_features,
                min(lanes, count),
            )
        )
    correction = asymmetric_activation
    if correction:
        multiplications += product.rows * out_features
    stages.append(
        Stage(
            "gather" if count else "rescale",
            lambda width: (
                (units("gather", width, n=total) if count else rescale(width, total))
                + units("fp16_mac_fp16", width if correction else 0)
            ),
            out_features,
            lanes,
        )
    )
    return estimate(
        scheme, product, main, stages, assumptions,
        multiplications=multiplications, settings={"num_high_precision_cols": count},
    )  # fmt: skip


def grouped_circuit(
    scheme: str,
    x_shape: Any,
    w_shape: Any,
    columns: Any,
    group_size: Any,
    assumptions: Assumptions,
    *,
    bits: int,
    high_bits: int,
) -> AreaReport:
    """Two integer products, the second of `columns` columns with more bits; a scale for each group of K.

    The sum of each group is cast to FP16, scaled and accumulated there. The columns are the last group.
    """
    product = checked_product(x_shape, w_shape, assumptions, NAMES)
    in_features, out_features = product.in_features, product.out_features
    count = whole_number("num_high_precision_cols", columns, least=0, most=in_features)
    group = whole_number("group_size", group_size, least=1, most=in_features)
    divides("group_size", group, "X_shape[1]", in_features)
    lanes, fixed = assumptions.lanes_k, fixed_width(assumptions)
    widest = max(
        accumulator_bits(bits, bits, group), accumulator_bits(high_bits, high_bits, count) if count else 0
    )
    total = fixed or widest
    groups = in_features // group
    stages = [Stage("quantize_x", lambda width: units("quant", width, n=bits), in_features, lanes, per="row")]
    if count:
        stages += [
            Stage(
                "quantize_high",
                lambda width: units("quant", width, n=high_bits),
                count,
                min(lanes, count),
                per="row",
            ),
            Stage(
                "high_precision",
                lambda width: fixed_dot(width, high_bits, high_bits, count, accumulator=fixed),
                count * out_features,
                min(lanes, count),
            ),
        ]
    results = out_features * (groups + bool(count))
    stages.append(
        Stage(
            "rescale_groups",
            lambda width: rescale(width, total) + units("fp16_add", width) + units("reg", width, n=16),
            results,
            lanes,
        )
    )
    return estimate(
        scheme, product, fixed_dot(lanes, bits, bits, group, accumulator=fixed), stages, assumptions,
        multiplications=product.multiplications + product.rows * (in_features + results),
        settings={"num_high_precision_cols": count, "group_size": group},
    )  # fmt: skip
