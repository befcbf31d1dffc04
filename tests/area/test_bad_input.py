"""What the named functions refuse, and that the error names the argument and the value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from mixq_compile import area
from mixq_compile.area import Assumptions
from mixq_compile.errors import OptionError

X, W = (4, 64), (64, 96)
LOW_RANK = (X, W, (64, 8), (8, 96))

WITH_X_AND_W: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (area.estimate_area_fp16, ()),
    (area.estimate_area_w8a8, ()),
    (area.estimate_area_smoothquant, ()),
    (area.estimate_area_llm_int8, (3,)),
    (area.estimate_area_llm_int4, (3,)),
    (area.estimate_area_mixq, (3,)),
    (area.estimate_area_quik, (3,)),
    (area.estimate_area_atom, (3, 32)),
    (area.estimate_area_awq, (8,)),
    (area.estimate_area_gptq, (8,)),
]
LQER = [
    area.estimate_area_lqer_int8,
    area.estimate_area_lqer_int4,
    area.estimate_area_lqer_mxint4,
    area.estimate_area_lqer_mxint2,
]
COLUMNS = [function for function, more in WITH_X_AND_W if more and more[0] == 3]


def refused(function: Callable[..., Any], *arguments: Any, message: str, **options: Any) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        function(*arguments, **options)


@pytest.mark.parametrize(("function", "more"), WITH_X_AND_W)
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "message"),
    [
        ((64,), W, "X_shape must have 2 dimensions, not 1: (64,)"),
        ((1, 4, 64), W, "X_shape must have 2 dimensions, not 3"),
        (X, (64, 96, 1), "W_shape must have 2 dimensions, not 3"),
        (64, W, "X_shape must be a pair of sizes, not 64"),
        ("4x64", W, "X_shape must be a pair of sizes, not '4x64'"),
        ((0, 64), W, "X_shape[0] must be at least 1, not 0"),
        (X, (64, -96), "W_shape[1] must be at least 1, not -96"),
        ((True, 64), W, "X_shape[0] must be a whole number, not True"),
        ((4, 64.0), W, "X_shape[1] must be a whole number, not 64.0"),
        ((4, 32), W, "X_shape[1] is 32, but W_shape[0] is 64"),
    ],
)
def test_shapes(
    function: Callable[..., Any], more: tuple[Any, ...], x_shape: Any, w_shape: Any, message: str
) -> None:
    refused(function, x_shape, w_shape, *more, message=message)


@pytest.mark.parametrize(("function", "more"), WITH_X_AND_W)
def test_more_lanes_than_input_features(function: Callable[..., Any], more: tuple[Any, ...]) -> None:
    message = "assumptions.lanes_k is 65, more than the 64 input features of W_shape"
    refused(function, X, W, *more, assumptions=Assumptions(lanes_k=65), message=message)


@pytest.mark.parametrize(("function", "more"), WITH_X_AND_W)
def test_options_of_the_wrong_kind(function: Callable[..., Any], more: tuple[Any, ...]) -> None:
    refused(function, X, W, *more, assumptions={"lanes_k": 16}, message="assumptions must be an Assumptions")
    refused(function, X, W, *more, report=1, message="report must be True or False, not 1")


@pytest.mark.parametrize("function", COLUMNS)
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (-1, "num_high_precision_cols must be 0 to 64, not -1"),
        (65, "num_high_precision_cols must be 0 to 64, not 65"),
        (True, "num_high_precision_cols must be a whole number, not True"),
        (2.5, "num_high_precision_cols must be a whole number, not 2.5"),
        (None, "num_high_precision_cols must be a whole number, not None"),
    ],
)
def test_high_precision_columns(function: Callable[..., Any], columns: Any, message: str) -> None:
    refused(function, X, W, columns, message=message)


@pytest.mark.parametrize("function", [area.estimate_area_awq, area.estimate_area_gptq])
def test_groups(function: Callable[..., Any]) -> None:
    refused(function, X, W, 7, message="num_groups is 7, which does not divide W_shape[1] = 96")
    refused(function, X, W, 0, message="num_groups must be 1 to 96, not 0")
    refused(function, X, W, 97, message="num_groups must be 1 to 96, not 97")
    refused(function, X, W, False, message="num_groups must be a whole number, not False")
    along_inputs = Assumptions(groups="inputs")
    refused(
        function,
        X,
        W,
        3,
        assumptions=along_inputs,
        message="num_groups is 3, which does not divide W_shape[0]",
    )


def test_groups_of_atom() -> None:
    message = "group_size is 48, which does not divide X_shape[1] = 64"
    refused(area.estimate_area_atom, X, W, 3, 48, message=message)


def test_schemes_of_mixq() -> None:
    message = "unknown scheme 'w8a8o15'. Did you mean 'w8a8o16'?"
    refused(area.estimate_area_mixq, X, W, 3, "w8a8o15", message=message)


@pytest.mark.parametrize("function", LQER)
@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (4, 32), "Xh_shape[1] is 32, but Wl_shape[0] is 64"),
        (2, (32, 8), "Ah_shape[0] is 32, but Wl_shape[0] is 64"),
        (2, (64, 9), "Ah_shape[1] is 9, but Bh_shape[0] is 8"),
        (3, (8, 95), "Bh_shape[1] is 95, but Wl_shape[1] is 96"),
        (2, (64, 0), "Ah_shape[1] must be at least 1, not 0"),
        (2, (64,), "Ah_shape must have 2 dimensions, not 1"),
        (3, (8, True), "Bh_shape[1] must be a whole number, not True"),
    ],
)
def test_factors(function: Callable[..., Any], place: int, shape: Any, message: str) -> None:
    shapes: list[Any] = list(LOW_RANK)
    shapes[place] = shape
    refused(function, *shapes, message=message)


@pytest.mark.parametrize("function", LQER)
def test_ranks_above_the_smaller_side(function: Callable[..., Any]) -> None:
    message = "the rank, Ah_shape[1] must be 1 to 64, not 65: no more than min(in, out)"
    refused(function, X, W, (64, 65), (65, 96), message=message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes_k": 0}, "assumptions.lanes_k must be at least 1, not 0"),
        ({"lanes_n": True}, "assumptions.lanes_n must be a whole number, not True"),
        ({"initiation_interval": 1.5}, "assumptions.initiation_interval must be a whole number, not 1.5"),
        ({"clock_ns": 0}, "assumptions.clock_ns must be a number of nanoseconds above 0, not 0"),
        ({"clock_ns": float("nan")}, "assumptions.clock_ns must be a number of nanoseconds above 0"),
        ({"technology": "nand"}, "unknown assumptions.technology 'nand'. Did you mean 'nand2'?"),
        ({"folding": "rate_matched"}, "Did you mean 'rate-matched'?"),
        ({"groups": "input"}, "Did you mean 'inputs'?"),
        ({"accumulators": "wide"}, "unknown assumptions.accumulators 'wide'"),
        ({"float_accumulator": "fp64"}, "unknown assumptions.float_accumulator 'fp64'"),
        ({"accumulator_bits": 65}, "assumptions.accumulator_bits must be 8 to 64, not 65"),
        ({"exact_depth": 0}, "assumptions.exact_depth must be at least 1, not 0"),
        ({"casts_weight": 1}, "assumptions.casts_weight must be True or False, not 1"),
    ],
)
def test_assumptions(options: dict[str, Any], message: str) -> None:
    refused(Assumptions, message=message, **options)
