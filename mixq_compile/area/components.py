"""Parts of a circuit as bills of units: dot products, casts, and what stands between them.

A component says which units it is made of; its area is their sum, and nothing else is added. Widths follow
from exact growth: products of n and m bits have n + m, a tree of adders gains one bit a level, and an
accumulator holds the largest sum of `depth` products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mixq_compile.area.checks import bits, whole_number
from mixq_compile.area.units import unit_area, unit_energy

LONGEST_DOT = 2**24
EXPONENT_BITS = 8
"""Of a block of MXINT."""


@dataclass(frozen=True)
class Units:
    """So many units of one kind and width."""

    name: str
    count: int
    widths: tuple[tuple[str, int], ...] = ()
    """Names and values of the unit's widths."""

    def __str__(self) -> str:
        inner = ",".join(str(value) for _, value in self.widths)
        return f"{self.count} × {self.name}{f'({inner})' if inner else ''}"


@dataclass(frozen=True)
class Component:
    """A bill of units."""

    units: tuple[Units, ...]

    def area(self, technology: str) -> float:
        """The sum of the units' areas."""
        return math.fsum(
            one.count * unit_area(one.name, technology, **dict(one.widths)) for one in self.units
        )

    def energy(self) -> float:
        """Picojoules at 45 nm of one cycle in which every unit works."""
        return math.fsum(one.count * unit_energy(one.name, **dict(one.widths)) for one in self.units)

    def __add__(self, other: Component) -> Component:
        return Component(self.units + other.units)


def units(name: str, count: int = 1, **widths: int) -> Component:
    """A component of `count` equal units."""
    return Component((Units(name, count, tuple(widths.items())),) if count else ())


def together(parts: Iterable[Component]) -> Component:
    """One component of several."""
    return Component(tuple(one for part in parts for one in part.units))


def accumulator_bits(weight_bits: int, activation_bits: int, depth: int) -> int:
    """Bits of the exact sum of `depth` products: weight_bits + activation_bits + ceil(log2 depth)."""
    return weight_bits + activation_bits + math.ceil(math.log2(depth))


def adder_tree(lanes: int, width: int) -> Component:
    """lanes - 1 adders that sum `lanes` numbers of `width` bits exactly: one more bit on each level."""
    levels: list[Component] = []
    while lanes > 1:
        width += 1
        levels.append(units("add", lanes // 2, n=width))
        lanes = math.ceil(lanes / 2)
    return together(levels)


def fixed_dot(
    lanes: int, weight_bits: int, activation_bits: int, depth: int, *, accumulator: int | None = None
) -> Component:
    """A dot product of integers: multipliers, adder tree and accumulator, all exact.

    `depth` is the number of products of one sum; `accumulator` replaces the accumulator's exact width. The
    accumulator is never narrower than the tree's result. Raises OptionError for widths outside 2 to 16 bits.
    """
    width, total = _widths(lanes, weight_bits, activation_bits, depth, accumulator)
    return together(
        (
            units("mul", lanes, n=weight_bits, m=activation_bits),
            adder_tree(lanes, width),
            units("accumulate", n=total),
        )
    )


def mxint_dot(
    lanes: int, weight_bits: int, activation_bits: int, depth: int, *, accumulator: int | None = None
) -> Component:
    """A dot product of MXINT: the integers' one, an adder of exponents, and alignment in the accumulator.

    Each block of `lanes` products has one exponent. Before a block's sum is added, the one of it and the
    running sum that has the smaller exponent is shifted right.
    """
    width, total = _widths(lanes, weight_bits, activation_bits, depth, accumulator)
    return together(
        (
            units("mul", lanes, n=weight_bits, m=activation_bits),
            adder_tree(lanes, width),
            units("add", n=EXPONENT_BITS + 1),
            units("mxint_accumulate", n=total),
        )
    )


def _widths(
    lanes: int, weight_bits: int, activation_bits: int, depth: int, accumulator: int | None
) -> tuple[int, int]:
    """Checks the arguments of a dot product; the widths of one product and of the accumulator."""
    whole_number("lanes", lanes, least=1)
    whole_number("depth", depth, least=1, most=LONGEST_DOT)
    width = bits("weight_bits", weight_bits) + bits("activation_bits", activation_bits)
    tree = width + math.ceil(math.log2(lanes))
    exact = accumulator_bits(weight_bits, activation_bits, depth)
    return width, max(tree, exact if accumulator is None else accumulator)


def float_dot(lanes: int, *, accumulator: str = "fp16") -> Component:
    """A dot product of FP16: multipliers, a tree of FP16 adders, and an accumulator in FP16 or FP32."""
    whole_number("lanes", lanes, least=1)
    wide = accumulator == "fp32"
    return together(
        (
            units("fp16_mul", lanes),
            units("fp16_add", lanes - 1),
            units("fp32_add" if wide else "fp16_add"),
            units("reg", n=32 if wide else 16),
        )
    )


def rescale(lanes: int, width: int) -> Component:
    """Integer sums to FP16, times a scale: a cast of `width` bits and a multiplication a lane."""
    return units("int_to_fp16", lanes, n=width) + units("fp16_mul", lanes)
