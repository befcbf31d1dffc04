"""Areas and energies of the units that circuits are made of.

`nand2` and `lut6` come from synthesis of the Verilog in `rtl/`: `unit_areas.json` holds areas at some widths,
and lines lead from one to the next. `um2-45nm` comes from Horowitz, "Computing's
energy problem", ISSCC 2014, where he gives a unit, and otherwise from NAND2 equivalents. Docs: docs/area.md.
"""

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mixq_compile.area.assumptions import TECHNOLOGIES
from mixq_compile.area.checks import whole_number
from mixq_compile.errors import OptionError, unknown_name

TABLE = Path(__file__).with_name("unit_areas.json")
WIDEST_UNIT = 64
BLOCK = 16
"""Lanes of the MXINT cast that was synthesised."""
FP16_BITS, FP32_BITS = 16, 32
HALF = 0.5

SQUARE_MICROMETRES = 0.798
"""Of one NAND2 with drive strength 1 in the 45 nm library FreePDK45 of NanGate."""
PICOJOULES = 0.0007
"""Per square micrometre and operation, for units that Horowitz does not give: his int8 multiplier has
0.00071, his FP16 multiplier 0.00067, his int32 adder 0.00073."""


@dataclass(frozen=True)
class _Product:
    """Area of a multiplier of n and m bits: product·n·m + sum·(n + m) + constant."""

    product: float
    sum: float
    constant: float

    def __call__(self, n: int, m: int) -> float:
        return self.product * n * m + self.sum * (n + m) + self.constant


@dataclass(frozen=True)
class _Line:
    """Area that grows by `slope` with each bit."""

    slope: float
    constant: float = 0.0

    def __call__(self, n: int) -> float:
        return self.slope * n + self.constant


HOROWITZ_MULTIPLIER = _Product(3.082, 5.297, 0.0)
"""Square micrometres, through Horowitz's int8 and int32 multipliers: 282 and 3495."""
HOROWITZ_ADDER = _Line(4.208, 2.33)
"""Square micrometres, through his int8 and int32 adders: 36 and 137."""
HOROWITZ = {"fp16_mul": 1640.0, "fp16_add": 1360.0, "fp32_add": 4184.0}
"""Square micrometres."""

MULTIPLIER_ENERGY = _Product(0.002995, 0.000521, 0.0)
"""Picojoules, through Horowitz's int8 and int32 multipliers, 0.2 and 3.1 pJ."""
ADDER_ENERGY = _Line(0.002917, 0.00667)
"""Picojoules, through his int8 and int32 adders, 0.03 and 0.1 pJ."""
FLOAT_ENERGY = {"fp16_mul": 1.1, "fp16_add": 0.4, "fp32_add": 0.9}
"""Picojoules."""


@dataclass(frozen=True)
class Unit:
    """One kind of unit: the widths that it takes, and how large it is."""

    area: Callable[..., float]
    """Of a technology and the widths."""
    widths: tuple[str, ...] = ()
    defaults: Mapping[str, int] = field(default_factory=dict)
    energy: Callable[..., float] | None = None
    """Picojoules of one operation; None: from its area."""


def unit_area(name: str, technology: str = "nand2", **widths: int) -> float:
    """The area of one unit, in the technology's unit: NAND2 equivalents, 6-input LUTs or µm² at 45 nm.

    Widths are in bits, 2 to 64: `n` (and `m`, the other operand of `mul`); `dequant` takes `asymmetric`, 0
    or 1, and `mxint_cast` takes `lanes`. The area never falls as a width grows. Raises OptionError that
    names the argument where one is unknown, missing or out of bounds.
    """
    unit, given = _resolved(name, widths)
    if technology not in TECHNOLOGIES:
        raise unknown_name("technology", technology, TECHNOLOGIES)
    return unit.area(technology, **given)


def unit_energy(name: str, **widths: int) -> float:
    """Picojoules of one operation at 45 nm, after Horowitz; for units that he does not give, by area."""
    unit, given = _resolved(name, widths)
    if unit.energy is not None:
        return unit.energy(**given)
    return PICOJOULES * unit.area("um2-45nm", **given)


def unit_names() -> tuple[str, ...]:
    """Every unit."""
    return tuple(UNITS)


def _resolved(name: str, widths: Mapping[str, int]) -> tuple[Unit, dict[str, int]]:
    if name not in UNITS:
        raise unknown_name("unit", name, UNITS)
    unit = UNITS[name]
    given = {**unit.defaults, **widths}
    for argument in given:
        if argument not in unit.widths:
            raise OptionError(
                f"{name} takes no {argument!r}; it takes {', '.join(unit.widths) or 'no widths'}."
            )
    for argument in unit.widths:
        if argument not in given:
            raise OptionError(f"{name} needs its width {argument!r}.")
        least, most = {"asymmetric": (0, 1), "lanes": (1, None)}.get(argument, (2, WIDEST_UNIT))
        given[argument] = whole_number(f"{name}'s {argument}", given[argument], least=least, most=most)
    return unit, given


@dataclass(frozen=True)
class _Grid:
    """Synthesised areas by one or two widths, made monotone."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    areas: tuple[tuple[float, ...], ...]
    """One for each pair of widths."""

    def __call__(self, n: int, m: int) -> float:
        """Between synthesised widths by lines."""
        (row, part_row), (column, part_column) = _place(self.rows, n), _place(self.columns, m)
        first, second = (
            line[column] + part_column * (line[column + 1] - line[column] if part_column else 0.0)
            for line in (self.areas[row], self.areas[row + 1 if part_row else row])
        )
        return first + part_row * (second - first)


def _place(points: tuple[int, ...], value: int) -> tuple[int, float]:
    """The interval of `points` that a value is in or next to, and how far along it; may be outside 0…1."""
    if len(points) == 1:
        return 0, 0.0
    index = min(max(bisect.bisect_right(points, value) - 1, 0), len(points) - 2)
    return index, (value - points[index]) / (points[index + 1] - points[index])


@functools.cache
def _table() -> dict[str, list[dict[str, float]]]:
    units: dict[str, list[dict[str, float]]] = json.loads(TABLE.read_text())["units"]
    return units


@functools.cache
def _grid(name: str, technology: str, asymmetric: int | None = None) -> _Grid:
    """The table of a unit. What is out of order is averaged, so that no width makes a unit smaller.

    Each area becomes the mean of the largest among narrower units and the smallest among wider ones.
    """
    found = {
        (int(row.get("n", 0)), int(row.get("m", 0))): row[technology]
        for row in _table()[name]
        if asymmetric is None or row["asymmetric"] == asymmetric
    }
    if name == "mul":
        found |= {(m, n): area for (n, m), area in found.items()}
    rows, columns = (tuple(sorted({pair[place] for pair in found})) for place in (0, 1))

    def area(n: int, m: int) -> float:
        narrower = [area for (a, b), area in found.items() if a <= n and b <= m]
        wider = [area for (a, b), area in found.items() if a >= n and b >= m]
        return (max(narrower) + min(wider)) / 2

    return _Grid(rows, columns, tuple(tuple(area(n, m) for m in columns) for n in rows))


def _widest(name: str) -> int:
    return int(max(row["n"] for row in _table()[name]))


def _multiplier(technology: str, n: int, m: int) -> float:
    """By the table; wider than it, in proportion to the product of the widths."""
    if technology == "um2-45nm":
        return HOROWITZ_MULTIPLIER(n, m)
    widest = _widest("mul")
    inside = min(n, widest), min(m, widest)
    return _grid("mul", technology)(*inside) * (n * m) / (inside[0] * inside[1])


def _tabled(name: str) -> Callable[..., float]:
    """The area of a unit by the table: outside it by its last two widths, at least half of its first."""

    def area(technology: str, n: int = 0, asymmetric: int | None = None) -> float:
        if technology == "um2-45nm":
            return SQUARE_MICROMETRES * area("nand2", n, asymmetric)
        grid = _grid(name, technology, asymmetric)
        return max(grid(n, 0), HALF * grid.areas[0][0])

    return area


def _dequant(technology: str, n: int, asymmetric: int) -> float:
    """A zero point never makes it smaller, whatever synthesis found."""
    tabled = _tabled("dequant")
    symmetric = tabled(technology, n, 0)
    return max(symmetric, tabled(technology, n, 1)) if asymmetric else symmetric


def _adder(technology: str, n: int) -> float:
    return HOROWITZ_ADDER(n) if technology == "um2-45nm" else _tabled("add")(technology, n)


def _float(name: str) -> Callable[..., float]:
    """The area of a floating-point unit that Horowitz gives."""
    return lambda technology: HOROWITZ[name] if technology == "um2-45nm" else _tabled(name)(technology)


def _mac(name: str, adder: str, bits: int) -> Callable[..., float]:
    """A multiplier, an adder and a register: synthesised as one, but for Horowitz's."""

    def area(technology: str) -> float:
        if technology == "um2-45nm":
            return HOROWITZ["fp16_mul"] + HOROWITZ[adder] + _tabled("reg")(technology, bits)
        return _tabled(name)(technology)

    return area


def _accumulate(technology: str, n: int) -> float:
    """Adder, register, and the gates that start a new sum; Horowitz has no such gates."""
    if technology == "um2-45nm":
        return HOROWITZ_ADDER(n) + _tabled("reg")(technology, n)
    return _tabled("accumulate")(technology, n)


def _with_float(name: str, cast: str, *parts: str) -> Callable[..., float]:
    """A cast with floating-point units beside it: synthesised as one, but for Horowitz's."""

    def area(technology: str, n: int) -> float:
        if technology == "um2-45nm":
            return _tabled(cast)(technology, n) + sum(HOROWITZ[part] for part in parts)
        return _tabled(name)(technology, n)

    return area


def _with_float_energy(cast: str, *parts: str) -> Callable[..., float]:
    return lambda n: PICOJOULES * _tabled(cast)("um2-45nm", n) + sum(FLOAT_ENERGY[part] for part in parts)


def _mxint_cast(technology: str, n: int, lanes: int) -> float:
    return _tabled("mxint_cast")(technology, n) * lanes / BLOCK


def _accumulate_energy(n: int) -> float:
    return ADDER_ENERGY(n) + PICOJOULES * _tabled("reg")("um2-45nm", n)


UNITS: dict[str, Unit] = {
    "mul": Unit(_multiplier, ("n", "m"), energy=MULTIPLIER_ENERGY),
    "add": Unit(_adder, ("n",), energy=ADDER_ENERGY),
    "reg": Unit(_tabled("reg"), ("n",)),
    "accumulate": Unit(_accumulate, ("n",), energy=_accumulate_energy),
    **{
        name: Unit(_float(name), energy=functools.partial(FLOAT_ENERGY.__getitem__, name))
        for name in HOROWITZ
    },
    "fp16_mac_fp16": Unit(
        _mac("fp16_mac_fp16", "fp16_add", FP16_BITS),
        energy=lambda: FLOAT_ENERGY["fp16_mul"] + FLOAT_ENERGY["fp16_add"],
    ),
    "fp16_mac_fp32": Unit(
        _mac("fp16_mac_fp32", "fp32_add", FP32_BITS),
        energy=lambda: FLOAT_ENERGY["fp16_mul"] + FLOAT_ENERGY["fp32_add"],
    ),
    "int_to_fp16": Unit(_tabled("int_to_fp16"), ("n",)),
    "fp16_to_int": Unit(_tabled("fp16_to_int"), ("n",)),
    "dequant": Unit(_dequant, ("n", "asymmetric"), {"asymmetric": 1}),
    "quant": Unit(
        _with_float("quant", "fp16_to_int", "fp16_mul"),
        ("n",),
        energy=_with_float_energy("fp16_to_int", "fp16_mul"),
    ),
    "gather": Unit(
        _with_float("gather", "int_to_fp16", "fp16_mul", "fp16_add"),
        ("n",),
        {"n": 32},
        energy=_with_float_energy("int_to_fp16", "fp16_mul", "fp16_add"),
    ),
    "compare_demux": Unit(_tabled("compare_demux")),
    "mxint_cast": Unit(_mxint_cast, ("n", "lanes"), {"lanes": BLOCK}),
    "mxint_accumulate": Unit(_tabled("mxint_accumulate"), ("n",)),
}
