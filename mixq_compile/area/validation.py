"""Compares predicted areas with synthesised ones: units, dot products, and whole linears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from mixq_compile.area import schemes
from mixq_compile.area.assumptions import Assumptions, Technology
from mixq_compile.area.components import fixed_dot, float_dot, mxint_dot
from mixq_compile.area.report import AreaReport
from mixq_compile.area.synthesis import Circuit, circuit, synthesise
from mixq_compile.area.unit_circuits import FITTED, Widths, unit_circuit
from mixq_compile.area.units import unit_area

BOUNDS = {"unit": 0.25, "dot": 0.15, "linear": 0.20}
"""Largest relative error of each kind."""
SYNTHESISED = ("nand2", "lut6")
DEPTH = 4096
"""Products of one sum in the dot products."""
ROWS, IN_FEATURES, OUT_FEATURES, RANK = 1, 256, 64, 16
"""Of the whole linears: small ones, whose areas are those of large ones but for their accumulators."""

HELD_OUT: dict[str, list[Widths]] = {
    "mul": [{"n": n, "m": m} for n, m in ((5, 7), (12, 6), (3, 9), (5, 5), (10, 10), (7, 14), (3, 3))],
    "add": [{"n": n} for n in (10, 18, 27, 40)],
    "reg": [{"n": 20}],
    "accumulate": [{"n": n} for n in (20, 28)],
    "int_to_fp16": [{"n": n} for n in (7, 14, 22, 30)],
    "fp16_to_int": [{"n": n} for n in (6, 10)],
    "dequant": [{"n": 3, "asymmetric": 1}, {"n": 6, "asymmetric": 1}, {"n": 6, "asymmetric": 0}],
    "quant": [{"n": n} for n in (6, 10)],
    "gather": [{"n": n} for n in (20, 28)],
    "mxint_cast": [{"n": 6}, {"n": 8, "lanes": 8}, {"n": 8, "lanes": 32}],
    "mxint_accumulate": [{"n": n} for n in (20, 30)],
}
"""Widths of units that no prediction rests on."""

FIXED_DOTS = (
    (16, 8, 8), (16, 4, 8), (16, 6, 6), (16, 4, 4), (16, 2, 8), (16, 4, 16), (16, 8, 16), (16, 16, 16),
    (32, 5, 7), (8, 12, 6), (16, 3, 9), (32, 8, 8), (8, 4, 4),
)  # fmt: skip
"""Lanes and bits of weights and activations."""
MXINT_DOTS = ((16, 8, 8), (16, 4, 8), (16, 4, 6), (16, 2, 8), (8, 5, 7), (32, 4, 8))
FLOAT_DOTS = (16, 8, 32)


@dataclass(frozen=True)
class Row:
    """One comparison."""

    kind: str
    """`unit`, `dot` or `linear`."""
    unit: str
    parameters: dict[str, int]
    technology: str
    predicted: float
    synthesised: float
    used_to_fit: bool
    """Whether predictions rest on this very measurement."""

    @property
    def error(self) -> float:
        """How far the prediction is off, as a part of what was synthesised."""
        return self.predicted / self.synthesised - 1 if self.synthesised else self.predicted

    @property
    def bound(self) -> float:
        """The largest error allowed."""
        return BOUNDS[self.kind]

    @property
    def holds(self) -> bool:
        """Whether the error is within the bound."""
        return abs(self.error) <= self.bound


@dataclass(frozen=True)
class _Check:
    """Something to compare: its circuit, and how its area is predicted in a technology."""

    kind: str
    unit: str
    parameters: dict[str, int]
    circuit: Circuit
    predict: Callable[[str], float]
    used_to_fit: bool = False


def validate(*, quick: bool = False, technologies: Sequence[str] = SYNTHESISED) -> list[Row]:
    """Every comparison, or with `quick` some of each kind, for each technology that yosys synthesises.

    Raises ProgramMissing where yosys or the cell library is absent.
    """
    checks = _quick_checks() if quick else [*_unit_checks(), *_dot_checks(), *_linear_checks()]
    results = synthesise([check.circuit for check in checks])
    return [
        Row(
            check.kind, check.unit, check.parameters, technology, check.predict(technology),
            getattr(result, technology), check.used_to_fit,
        )
        for technology in technologies
        for check, result in zip(checks, results, strict=True)
    ]  # fmt: skip


def as_text(rows: Sequence[Row]) -> str:
    """The rows as a table, those out of bounds marked."""
    lines = [f"{'circuit':44} {'unit':6} {'predicted':>10} {'synthesised':>11} {'error':>7}  fitted"]
    for row in rows:
        widths = ", ".join(f"{name} {value}" for name, value in row.parameters.items())
        lines.append(
            f"{f'{row.unit}({widths})':44} {row.technology:6} {row.predicted:10.0f} {row.synthesised:11.0f} "
            f"{row.error:+7.1%}  {'yes' if row.used_to_fit else 'no':3}"
            f"{'' if row.holds else f'  beyond {row.bound:.0%}'}"
        )
    return "\n".join(lines)


def _unit(name: str, widths: Widths, used: bool) -> _Check:
    return _Check(
        "unit", name, widths, unit_circuit(name, **widths),
        lambda technology: unit_area(name, technology, **widths), used,
    )  # fmt: skip


def _unit_checks() -> list[_Check]:
    return [
        _unit(name, widths, used)
        for table, used in ((FITTED, True), (HELD_OUT, False))
        for name, rows in table.items()
        for widths in rows
    ]


def _log(number: int) -> int:
    return (number - 1).bit_length()


def _dot_checks() -> list[_Check]:
    checks = []
    for name, module, build, sizes in (
        ("fixed_dot", "fixed_dot", fixed_dot, FIXED_DOTS),
        ("mxint_dot", "mxint_dot", mxint_dot, MXINT_DOTS),
    ):
        for lanes, weight, activation in sizes:
            growth = _log(DEPTH) - _log(lanes)
            checks.append(
                _Check(
                    "dot",
                    name,
                    {"lanes": lanes, "weight_bits": weight, "activation_bits": activation},
                    circuit(module, LANES=lanes, N=weight, M=activation, GROWTH=growth),
                    build(lanes, weight, activation, DEPTH).area,
                )
            )
    return checks + [
        _Check("dot", "float_dot", {"lanes": lanes}, circuit("float_dot", LANES=lanes), float_dot(lanes).area)
        for lanes in FLOAT_DOTS
    ]


def _linear_checks() -> list[_Check]:
    return [check for lanes in (8, 16) for check in _linears(lanes)]


def _linears(lanes: int) -> list[_Check]:
    """Every scheme with all its stages as wide as the main dot product."""
    x, w = (ROWS, IN_FEATURES), (IN_FEATURES, OUT_FEATURES)
    low_rank = (x, w, (IN_FEATURES, RANK), (RANK, OUT_FEATURES))
    sizes = {"LANES": lanes, "GROWTH": _log(IN_FEATURES) - _log(lanes)}
    rank = {**sizes, "RANK_GROWTH": _log(RANK) - _log(lanes)}

    def check(
        name: str, built: Circuit, estimate: Callable[..., float | AreaReport], *shapes: object
    ) -> _Check:
        def predict(technology: str) -> float:
            taken = Assumptions(lanes_k=lanes, technology=cast(Technology, technology))
            found = estimate(*shapes, assumptions=taken)
            assert isinstance(found, float)
            return found

        return _Check("linear", name, {"lanes": lanes}, built, predict)

    low_rank_kinds = (
        ("lqer_int8", "low_rank_linear", 8, 16, schemes.estimate_area_lqer_int8),
        ("lqer_int4", "low_rank_linear", 4, 16, schemes.estimate_area_lqer_int4),
        ("lqer_mxint4", "low_rank_mxint_linear", 4, 8, schemes.estimate_area_lqer_mxint4),
        ("lqer_mxint2", "low_rank_mxint_linear", 2, 8, schemes.estimate_area_lqer_mxint2),
    )
    integers = circuit("integer_linear", N=8, M=8, **sizes)
    mixed8 = circuit("mixed_linear", N=8, M=8, **sizes)
    mixed4 = circuit("mixed_linear", N=4, M=4, **sizes)
    stored = circuit("mixed_linear", N=8, M=8, CASTS_WEIGHT=0, **sizes)
    weights = circuit("weight_only_linear", LANES=lanes)
    return [
        check("fp16", circuit("float_dot", LANES=lanes), schemes.estimate_area_fp16, x, w),
        check("w8a8", integers, schemes.estimate_area_w8a8, x, w),
        check("llm_int8", mixed8, schemes.estimate_area_llm_int8, x, w, lanes),
        check("llm_int4", mixed4, schemes.estimate_area_llm_int4, x, w, lanes),
        check("w8a8o16", stored, schemes.estimate_area_mixq, x, w, lanes),
        check("awq", weights, schemes.estimate_area_awq, x, w, 1),
        check("gptq", weights, schemes.estimate_area_gptq, x, w, 1),
        *(
            check(name, circuit(module, N=low, M=high, **rank), estimate, *low_rank)
            for name, module, low, high, estimate in low_rank_kinds
        ),
    ]


QUICK_UNITS: tuple[tuple[str, Widths], ...] = (
    ("mul", {"n": 5, "m": 7}), ("mul", {"n": 3, "m": 9}), ("add", {"n": 18}), ("int_to_fp16", {"n": 22}),
    ("dequant", {"n": 3, "asymmetric": 1}), ("mxint_accumulate", {"n": 20}),
)  # fmt: skip
QUICK_LINEARS = ("w8a8", "awq", "llm_int8", "lqer_mxint4")


def _quick_checks() -> list[_Check]:
    """Units that were held out, small dot products, and four linears of eight lanes."""
    dots = [check for check in _dot_checks() if check.parameters["lanes"] == 8]
    linears = [check for check in _linears(8) if check.unit in QUICK_LINEARS]
    return [*(_unit(name, widths, False) for name, widths in QUICK_UNITS), *dots, *linears]
