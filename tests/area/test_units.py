"""Unit areas: every unit in every technology, monotone in its widths, and refused where it makes no sense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixq_compile.area import unit_area
from mixq_compile.area.assumptions import TECHNOLOGIES
from mixq_compile.area.units import UNITS, unit_energy, unit_names
from mixq_compile.errors import OptionError

technologies = st.sampled_from(TECHNOLOGIES)
widths = st.integers(2, 40)
ONE_WIDTH = [name for name, unit in UNITS.items() if unit.widths and name != "mul"]
NO_WIDTH = [name for name, unit in UNITS.items() if not unit.widths]


@pytest.mark.parametrize("name", ONE_WIDTH)
@pytest.mark.parametrize("technology", TECHNOLOGIES)
def test_a_wider_unit_is_never_smaller(name: str, technology: str) -> None:
    areas = [unit_area(name, technology, n=n) for n in range(2, 41)]
    assert areas == sorted(areas)
    assert areas[0] >= 0


@given(technologies, widths, widths)
def test_a_multiplier_grows_with_either_operand_and_does_not_care_for_their_order(
    technology: str, n: int, m: int
) -> None:
    area = unit_area("mul", technology, n=n, m=m)
    assert area > 0
    assert unit_area("mul", technology, n=n + 1, m=m) >= area
    assert unit_area("mul", technology, n=m, m=n) == pytest.approx(area)


@given(widths, widths)
def test_a_multiplier_has_at_least_a_gate_for_each_pair_of_bits(n: int, m: int) -> None:
    assert unit_area("mul", n=n, m=m) >= n * m


@given(technologies, st.integers(8, 40))
def test_an_accumulator_is_an_adder_a_register_and_what_starts_a_new_sum(technology: str, n: int) -> None:
    parts = unit_area("add", technology, n=n) + unit_area("reg", technology, n=n)
    start = unit_area("accumulate", technology, n=n) - parts
    assert -1e-9 <= start <= 0.3 * parts + n


@given(technologies, widths)
def test_a_zero_point_costs_area(technology: str, n: int) -> None:
    asymmetric, symmetric = (unit_area("dequant", technology, n=n, asymmetric=kind) for kind in (1, 0))
    assert asymmetric >= symmetric


@pytest.mark.parametrize("name", NO_WIDTH)
@pytest.mark.parametrize("technology", TECHNOLOGIES)
def test_a_unit_without_widths_has_an_area(name: str, technology: str) -> None:
    assert unit_area(name, technology) > 0


@pytest.mark.parametrize("technology", TECHNOLOGIES)
def test_wider_sums_make_a_larger_multiply_and_add(technology: str) -> None:
    assert unit_area("fp16_mac_fp32", technology) > unit_area("fp16_mac_fp16", technology)


def test_an_mxint_cast_grows_with_its_lanes() -> None:
    assert unit_area("mxint_cast", n=8, lanes=32) == pytest.approx(2 * unit_area("mxint_cast", n=8))


@pytest.mark.parametrize(
    ("name", "widths", "square_micrometres"),
    [
        ("add", {"n": 8}, 36),
        ("add", {"n": 32}, 137),
        ("mul", {"n": 8, "m": 8}, 282),
        ("mul", {"n": 32, "m": 32}, 3495),
        ("fp16_add", {}, 1360),
        ("fp32_add", {}, 4184),
        ("fp16_mul", {}, 1640),
    ],
)
def test_areas_at_45_nm_are_those_that_horowitz_gives(
    name: str, widths: dict[str, int], square_micrometres: float
) -> None:
    assert unit_area(name, "um2-45nm", **widths) == pytest.approx(square_micrometres, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "widths", "picojoules"),
    [
        ("add", {"n": 8}, 0.03),
        ("add", {"n": 32}, 0.1),
        ("mul", {"n": 8, "m": 8}, 0.2),
        ("mul", {"n": 32, "m": 32}, 3.1),
        ("fp16_mul", {}, 1.1),
    ],
)
def test_energies_are_those_that_horowitz_gives(name: str, widths: dict[str, int], picojoules: float) -> None:
    assert unit_energy(name, **widths) == pytest.approx(picojoules, rel=5e-3)


@pytest.mark.parametrize("name", unit_names())
def test_every_unit_takes_energy(name: str) -> None:
    given = {argument: 8 for argument in UNITS[name].widths if argument not in UNITS[name].defaults}
    assert unit_energy(name, **given) > 0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mull", {}, "Did you mean 'mul'"),
        ("mul", {"n": 8}, "mul needs its width 'm'"),
        ("add", {"n": 8, "m": 8}, "add takes no 'm'; it takes n"),
        ("fp16_mul", {"n": 8}, "fp16_mul takes no 'n'; it takes no widths"),
        ("add", {"n": 1}, "add's n must be 2 to 64, not 1"),
        ("add", {"n": True}, "add's n must be a whole number, not True"),
        ("add", {"n": 8.5}, "add's n must be a whole number, not 8.5"),
        ("dequant", {"n": 4, "asymmetric": 2}, "dequant's asymmetric must be 0 to 1, not 2"),
        ("add", {"n": 8, "technology": "nand3"}, "Did you mean 'nand2'"),
    ],
)
def test_bad_units(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        unit_area(name, **arguments)  # type: ignore[arg-type]
