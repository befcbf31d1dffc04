"""Dot products as bills of units: widths, sums, monotonicity."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixq_compile.area import fixed_dot, float_dot, mxint_dot, unit_area
from mixq_compile.area.assumptions import TECHNOLOGIES
from mixq_compile.area.components import accumulator_bits, adder_tree, rescale
from mixq_compile.area.layout import rate_matched
from mixq_compile.errors import OptionError

technologies = st.sampled_from(TECHNOLOGIES)
bits = st.integers(2, 15)
lanes = st.integers(1, 40)
depths = st.integers(1, 20000)
dots = st.sampled_from([fixed_dot, mxint_dot])


@given(dots, technologies, lanes, bits, bits, depths)
def test_a_dot_product_grows_with_bits_lanes_and_depth(
    dot: object, technology: str, count: int, weight: int, activation: int, depth: int
) -> None:
    def area(*given: int) -> float:
        return dot(*given).area(technology)  # type: ignore[operator, no-any-return]

    base = area(count, weight, activation, depth)
    assert area(count + 1, weight, activation, depth) >= base
    assert area(count, weight + 1, activation, depth) >= base
    assert area(count, weight, activation + 1, depth) >= base
    assert area(count, weight, activation, 2 * depth) >= base


@given(technologies, lanes)
def test_a_floating_point_dot_product_grows_with_lanes_and_with_its_accumulator(
    technology: str, count: int
) -> None:
    area = float_dot(count).area(technology)
    assert float_dot(count + 1).area(technology) > area
    assert float_dot(count, accumulator="fp32").area(technology) > area


@given(technologies, lanes, bits, bits, depths)
def test_mxint_costs_more_than_fixed_point_of_the_same_bits(
    technology: str, count: int, weight: int, activation: int, depth: int
) -> None:
    given = (count, weight, activation, depth)
    assert mxint_dot(*given).area(technology) > fixed_dot(*given).area(technology)


@given(lanes, bits, bits, depths)
def test_a_component_is_the_sum_of_its_units(count: int, weight: int, activation: int, depth: int) -> None:
    component = fixed_dot(count, weight, activation, depth)
    total = sum(one.count * unit_area(one.name, **dict(one.widths)) for one in component.units)
    assert component.area("nand2") == pytest.approx(total)


@given(st.integers(1, 200), st.integers(2, 20))
def test_a_tree_has_an_adder_less_than_numbers_and_a_bit_more_on_each_level(count: int, width: int) -> None:
    tree = adder_tree(count, width).units
    assert sum(one.count for one in tree) == count - 1
    assert [dict(one.widths)["n"] for one in tree] == list(range(width + 1, width + 1 + len(tree)))


@given(bits, bits, depths)
def test_an_exact_accumulator_holds_the_largest_sum_and_is_no_wider(
    weight: int, activation: int, depth: int
) -> None:
    largest = depth * 2 ** (weight - 1) * 2 ** (activation - 1)
    width = accumulator_bits(weight, activation, depth)
    assert largest < 2 ** (width - 1) or largest == 2 ** (weight + activation - 2) * depth == 2 ** (width - 2)
    assert largest > 2 ** (width - 4)


def test_the_units_of_a_dot_product_are_named() -> None:
    assert [str(one) for one in fixed_dot(4, 4, 8, 64).units] == [
        "4 × mul(4,8)",
        "2 × add(13)",
        "1 × add(14)",
        "1 × accumulate(18)",
    ]


def test_a_fixed_accumulator_is_never_narrower_than_the_tree() -> None:
    assert "accumulate(20)" in str(fixed_dot(16, 8, 8, 4096, accumulator=16).units[-1])
    assert "accumulate(32)" in str(fixed_dot(16, 8, 8, 4096, accumulator=32).units[-1])


def test_rescaling_casts_and_multiplies() -> None:
    area = 3 * (unit_area("int_to_fp16", n=28) + unit_area("fp16_mul"))
    assert rescale(3, 28).area("nand2") == pytest.approx(area)


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_folded_stage_keeps_up_with_the_fewest_lanes(work: int, cycles: int) -> None:
    count = rate_matched(work, cycles)
    assert count * cycles >= work
    assert count == 1 or (count - 1) * cycles < work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 1, 8, 64), "weight_bits must be 2 to 16, not 1"),
        ((16, 8, 17, 64), "activation_bits must be 2 to 16, not 17"),
        ((0, 8, 8, 64), "lanes must be at least 1, not 0"),
        ((16, 8, 8, 0), "depth must be 1 to .*, not 0"),
        ((16, True, 8, 64), "weight_bits must be a whole number, not True"),
        ((16, 8.0, 8, 64), "weight_bits must be a whole number, not 8.0"),
    ],
)
def test_bad_dot_products(arguments: tuple[int, int, int, int], message: str) -> None:
    for dot in (fixed_dot, mxint_dot):
        with pytest.raises(OptionError, match=message):
            dot(*arguments)
