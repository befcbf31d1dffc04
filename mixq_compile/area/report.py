"""What an estimate says: area by parts, cycles, energy, and everything that was assumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixq_compile.area.assumptions import Assumptions

SIGNIFICANT = 2
"""Digits that mean something: synthesis itself varies by ±15 %."""


@dataclass(frozen=True)
class AreaReport:
    """The circuit of one quantized linear. Its parts add up to its total."""

    scheme: str
    shape: tuple[int, int, int]
    """Rows of X, input features and output features."""
    settings: Mapping[str, int | str]
    """What the scheme was given beside the shapes."""
    parts: Mapping[str, float]
    """Area of each part; `main` is the dot product that every weight passes."""
    lanes: Mapping[str, int]
    """Elements that each part works on in one cycle."""
    bill: Mapping[str, tuple[str, ...]]
    """The units that each part is made of."""
    cycles: int
    """Until the product of all rows is done; the parts work at the same time."""
    utilisation: Mapping[str, float]
    """Work of each part as a share of what its lanes could do in these cycles."""
    energy_pj: float
    """Picojoules of the units that work, at 45 nm; no memory, no clock tree, no leakage."""
    multiplications: int
    """Of the algorithm, whatever the circuit: a weight is dequantized once."""
    assumptions: Assumptions

    @property
    def total(self) -> float:
        """Area of all parts."""
        return math.fsum(self.parts.values())

    @property
    def unit(self) -> str:
        """What area is counted in."""
        return self.assumptions.unit

    @property
    def area_cycles(self) -> float:
        """Area times cycles: the smaller, the more products a given area computes in a given time."""
        return self.total * self.cycles

    @property
    def seconds(self) -> float:
        """Time of all cycles at the assumed clock."""
        return self.cycles * self.assumptions.clock_ns * 1e-9

    def to_json(self) -> dict[str, Any]:
        """Everything, with the assumptions, as JSON-able data."""
        return {
            "scheme": self.scheme,
            "shape": list(self.shape),
            "settings": dict(self.settings),
            "total": self.total,
            "unit": self.unit,
            "parts": dict(self.parts),
            "lanes": dict(self.lanes),
            "bill": {name: list(units) for name, units in self.bill.items()},
            "cycles": self.cycles,
            "area_cycles": self.area_cycles,
            "seconds": self.seconds,
            "utilisation": dict(self.utilisation),
            "energy_pj": self.energy_pj,
            "multiplications": self.multiplications,
            "assumptions": self.assumptions.to_json(),
        }

    def __str__(self) -> str:
        rows, inputs, outputs = self.shape
        given = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines = [
            f"{self.scheme}: X {rows}×{inputs}, W {inputs}×{outputs}{given and f', {given}'}",
            f"  area        {rounded(self.total)} {self.unit}",
        ]
        for name, area in self.parts.items():
            lines.append(
                f"    {name:<14} {rounded(area):>9}  {area / self.total:>5.1%}  {self.lanes[name]:>3} lanes, "
                f"{self.utilisation[name]:.1%} busy: {', '.join(self.bill[name])}"
            )
        assumed = ", ".join(
            f"{name} {', '.join(value) if isinstance(value, list) else value}"
            for name, value in self.assumptions.to_json().items()
        )
        lines += [
            f"  cycles      {self.cycles} ({self.seconds * 1e6:.4g} µs)",
            f"  area×cycles {rounded(self.area_cycles)}",
            f"  energy      {rounded(self.energy_pj)} pJ",
            f"  assumed     {assumed}",
        ]
        return "\n".join(lines)


def rounded(value: float) -> str:
    """A figure with as many digits as mean something."""
    if not value:
        return "0"
    digits = SIGNIFICANT - 1 - math.floor(math.log10(abs(value)))
    found = round(value, digits)
    if abs(found) >= 1e7:
        return f"{found:.{SIGNIFICANT - 1}e}"
    return f"{found:.0f}" if digits <= 0 else f"{found:.{digits}f}"
