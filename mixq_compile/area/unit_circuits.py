"""Which circuit each unit is, and the widths at which units are measured for the table of unit areas."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mixq_compile.area.synthesis import Circuit, Synthesis, circuit, library_path, synthesise, yosys_version
from mixq_compile.errors import unknown_name

TABLE = Path(__file__).with_name("unit_areas.json")

EXPONENT = 9
"""Bits of the sum of two exponents of MXINT."""
GROWTH = 4
"""Bits that the measured accumulators of MXINT have beyond a block's sum."""

CIRCUITS: dict[str, Callable[..., Circuit]] = {
    "mul": lambda n, m: circuit("mul", N=n, M=m),
    "add": lambda n: circuit("add", N=n),
    "reg": lambda n: circuit("register", N=n),
    "accumulate": lambda n: circuit("accumulate", N=n),
    "fp16_mul": lambda: circuit("fp16_mul"),
    "fp16_add": lambda: circuit("fp16_add"),
    "fp16_mac_fp16": lambda: circuit("fp16_mac_fp16"),
    "fp16_mac_fp32": lambda: circuit("fp16_mac_fp32"),
    "fp32_add": lambda: circuit("fp32_add"),
    "int_to_fp16": lambda n: circuit("int_to_fp16", N=n),
    "fp16_to_int": lambda n: circuit("fp16_to_int", N=n),
    "dequant": lambda n, asymmetric=1: circuit("dequant", N=n, ASYMMETRIC=asymmetric),
    "quant": lambda n: circuit("quant", N=n),
    "gather": lambda n=32: circuit("gather", N=n),
    "compare_demux": lambda: circuit("compare_demux"),
    "mxint_cast": lambda n, lanes=16: circuit("mxint_cast", N=n, LANES=lanes),
    "mxint_accumulate": lambda n: circuit("mxint_accumulate", W=n - GROWTH, GROWTH=GROWTH, E=EXPONENT),
}
"""By the unit's name, of its widths."""

Widths = dict[str, int]


def _widths(*values: int) -> list[Widths]:
    return [{"n": value} for value in values]


_MULTIPLIERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
_HELD_OUT_MULTIPLIERS = ((3, 3), (5, 5), (5, 7), (6, 12), (10, 10))

FITTED: dict[str, list[Widths]] = {
    "mul": [
        {"n": n, "m": m}
        for n in _MULTIPLIERS
        for m in _MULTIPLIERS
        if n <= m and (n, m) not in _HELD_OUT_MULTIPLIERS
    ],
    "add": _widths(4, 8, 12, 16, 20, 24, 32, 48, 64),
    "reg": _widths(8, 16, 32),
    "accumulate": _widths(8, 16, 24, 32, 48),
    "fp16_mul": [{}],
    "fp16_add": [{}],
    "fp16_mac_fp16": [{}],
    "fp16_mac_fp32": [{}],
    "fp32_add": [{}],
    "int_to_fp16": _widths(2, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48),
    "fp16_to_int": _widths(2, 4, 8, 12, 16),
    "dequant": [{"n": n, "asymmetric": asymmetric} for asymmetric in (0, 1) for n in (2, 4, 8)],
    "quant": _widths(2, 4, 8, 12, 16),
    "gather": _widths(12, 16, 24, 32, 48),
    "compare_demux": [{}],
    "mxint_cast": _widths(2, 4, 8, 11),
    "mxint_accumulate": _widths(12, 16, 24, 28, 32, 40, 48),
}
"""The widths of the table: every prediction rests on these, and on no other measurement."""


def unit_circuit(name: str, **widths: int) -> Circuit:
    """The circuit of a unit. Raises OptionError for a name that no unit has."""
    if name not in CIRCUITS:
        raise unknown_name("unit", name, CIRCUITS)
    return CIRCUITS[name](**widths)


def measured(requests: Sequence[tuple[str, Widths]]) -> list[tuple[str, Widths, Synthesis]]:
    """Units of given widths with what synthesis finds for them."""
    results = synthesise([unit_circuit(name, **widths) for name, widths in requests])
    return [(name, widths, result) for (name, widths), result in zip(requests, results, strict=True)]


def table(rows: Sequence[tuple[str, Widths, Synthesis]]) -> dict[str, Any]:
    """Measured units as JSON-able data, with the programs behind them."""
    units: dict[str, list[dict[str, float]]] = {}
    for name, widths, result in rows:
        units.setdefault(name, []).append({**widths, "nand2": result.nand2, "lut6": result.lut6})
    return {"library": library_path().name, "yosys": yosys_version(), "units": units}


def dumped(content: dict[str, Any]) -> str:
    """A table as text, one measurement a line."""
    lines = [f'  "{key}": {json.dumps(content[key])},' for key in content if key != "units"]
    units = ",\n".join(
        f'    "{name}": [\n' + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]"
        for name, rows in content["units"].items()
    )
    return "\n".join(["{", *lines, '  "units": {', units, "  }", "}", ""])


def write_table(path: Path = TABLE) -> None:
    """Measures the fitted widths and writes the table that estimates read."""
    path.write_text(dumped(table(measured([(name, row) for name, rows in FITTED.items() for row in rows]))))
