"""`mixq bench breakdown`: what each fusion brings, and what learning outlier columns costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mixq_compile.benchmarking.baselines import float_name
from mixq_compile.benchmarking.choices import Announce, check_replays
from mixq_compile.benchmarking.environment import examine
from mixq_compile.benchmarking.forced_misses import MissCost, miss_costs
from mixq_compile.benchmarking.linear_bench import default_dtype
from mixq_compile.benchmarking.packed_linear import PackedLinear, default_capacity
from mixq_compile.benchmarking.planted import planted_activation, planted_columns, random_weight
from mixq_compile.benchmarking.results import Document, Plot, Table, number, summarise_missing
from mixq_compile.benchmarking.shapes import LAYOUT_ROWS, LAYOUT_SHAPES, LinearShape
from mixq_compile.benchmarking.staged_linear import STAGES, WAITING, fused
from mixq_compile.benchmarking.timing import Call, Timings, measure, measure_floor

POLICIES = ("static", "frozen", "lazy", "exact")
TOO_FEW_ROWS = "so few rows take the weight-only path, which quantizes nothing"


@dataclass(frozen=True)
class BreakdownOptions:
    """What `mixq bench breakdown` measures, and how."""

    shapes: tuple[LinearShape, ...] = LAYOUT_SHAPES
    rows: tuple[int, ...] = LAYOUT_ROWS
    miss_percents: tuple[int, ...] = (0, 1, 5, 20, 100)
    """Shares of calls that meet a new outlier column; the first is what the others are set against."""
    outlier_size: float = 20.0
    replays: int = 21
    kernel: str = "auto"

    def __post_init__(self) -> None:
        check_replays(self.replays)


@dataclass(frozen=True)
class BreakdownCase:
    """One linear at one number of rows, with every outlier slot in use."""

    name: str
    out_features: int
    in_features: int
    rows: int
    outlier_columns: int
    timings: Timings
    """16 bit, the stages, and the policies without a new column."""
    missing: dict[str, str]
    stage_speedup: dict[str, float]
    """Time of 16 bit over that of each stage."""
    policy_overhead: dict[str, float]
    """Time of each policy over that of `static`, less 1."""
    misses: tuple[MissCost, ...]


@torch.no_grad()
def run(options: BreakdownOptions, device: torch.device, announce: Announce, commit: str = "") -> Document:
    """Measures every shape at every number of rows."""
    floor = measure_floor(device, options.replays)
    cases: list[BreakdownCase] = []
    total = len(options.shapes) * len(options.rows)
    for shape in options.shapes:
        dtype, capacity = default_dtype(device), default_capacity(shape.in_features)
        weight = random_weight(shape.out_features, shape.in_features, dtype, device)
        linear = PackedLinear.pack(weight, 8, capacity, options.kernel)
        columns = planted_columns(shape.in_features, capacity)
        for rows in options.rows:
            announce(len(cases), total, f"{shape}, {rows} rows")
            x = planted_activation(rows, shape.in_features, columns, options.outlier_size, dtype, device)
            cases.append(_case(shape, linear, columns, x, options))
    return Document(
        benchmark="breakdown",
        environment=examine(device, floor, commit),
        options=options,
        cases=tuple(cases),
        summary=_summary(cases),
        missing=summarise_missing([case.missing for case in cases]),
        tables=tables(cases),
        plots=plots(cases),
    )


def _case(
    shape: LinearShape, linear: PackedLinear, columns: Sequence[int], x: Tensor, options: BreakdownOptions
) -> BreakdownCase:
    linear.know(columns)
    base = float_name(x.dtype)
    calls = {base: Call(lambda: functional.linear(x, linear.weight))}
    missing = {}
    quantizes = x.shape[0] > linear.small_m
    if quantizes:
        calls |= _stage_calls(linear, x) | _policy_calls(linear, x)
    else:
        missing = dict.fromkeys((*STAGES, *POLICIES), TOO_FEW_ROWS)
    timings, failed = measure(calls, x.device, options.replays)
    medians = {name: timing.median_us for name, timing in timings.items()}
    return BreakdownCase(
        name=shape.name,
        out_features=shape.out_features,
        in_features=shape.in_features,
        rows=x.shape[0],
        outlier_columns=len(columns) if quantizes else 0,
        timings=timings,
        missing=missing | failed,
        stage_speedup={name: medians[base] / medians[name] for name in STAGES if name in medians},
        policy_overhead={name: medians[name] / medians["static"] - 1 for name in POLICIES if name in medians},
        misses=miss_costs(linear, columns, x, options.miss_percents) if quantizes else (),
    )


def _stage_calls(linear: PackedLinear, x: Tensor) -> dict[str, Call]:
    return {
        name: Call(
            lambda stage=stage: stage(linear, x),  # type: ignore[misc]
            graphed=name not in WAITING,
            optional=stage is not fused,
        )
        for name, stage in STAGES.items()
    }


def _policy_calls(linear: PackedLinear, x: Tensor) -> dict[str, Call]:
    calls = {}
    for policy in POLICIES:
        own = linear.with_own_state()
        if policy == "frozen":
            own.state.freeze()
        calls[policy] = Call(lambda own=own, policy=policy: own.whole(x, policy))  # type: ignore[misc]
    return calls


def _summary(cases: Sequence[BreakdownCase]) -> dict[str, float | None]:
    overheads = [case.policy_overhead["exact"] for case in cases if "exact" in case.policy_overhead]
    return {"exact without misses over static: largest overhead": max(overheads)} if overheads else {}


def tables(cases: Sequence[BreakdownCase]) -> tuple[Table, ...]:
    """Stages, policies without a miss, and rates of misses."""
    shown = [case for case in cases if case.stage_speedup]
    place = ("N × K", "M")
    stage_rows = tuple(
        (*_place(case), number(_float_us(case), 1), *(_stage_cell(case, name) for name in STAGES))
        for case in shown
    )
    policy_rows = tuple((*_place(case), *(_policy_cell(case, name) for name in POLICIES)) for case in shown)
    miss_rows = tuple(
        (*_place(case), f"{cost.percent} %", str(cost.misses), number(cost.mean_us, 1),
         number(cost.median_us, 1), number(cost.p90_us, 1), f"{cost.overhead:+.1%}")
        for case in shown for cost in case.misses
    )  # fmt: skip
    return (
        Table(
            "Stages, µs (speed-up over 16 bit)", (*place, "16 bit", *STAGES), stage_rows,
            "The first waits for the device, so that its launches and the wait are in its time; the others "
            "are CUDA graphs on a GPU. The integer product is the library's in all but the last.",
        ),
        Table(
            "Policies without a new column, µs (over static)", (*place, *POLICIES), policy_rows,
            "The whole linear: quantization, check, outlier weights, product.",
        ),
        Table(
            "Forced misses, policy exact, µs",
            (*place, "misses", "learned", "mean", "median", "p90", "mean over the first"), miss_rows,
            "So many of 100 calls meet a column that is not known: they learn it, quantize again and fetch "
            "its weights.",
        ),
    )  # fmt: skip


def _place(case: BreakdownCase) -> tuple[str, str]:
    return f"{case.out_features}×{case.in_features}", str(case.rows)


def _stage_cell(case: BreakdownCase, name: str) -> str:
    return f"{number(_median(case, name), 1)} ({number(case.stage_speedup.get(name))}×)"


def _policy_cell(case: BreakdownCase, name: str) -> str:
    return f"{number(_median(case, name), 1)} ({case.policy_overhead[name]:+.1%})"


def _median(case: BreakdownCase, name: str) -> float | None:
    return case.timings[name].median_us if name in case.timings else None


def _float_us(case: BreakdownCase) -> float:
    return next(iter(case.timings.values())).median_us


def plots(cases: Sequence[BreakdownCase]) -> tuple[Plot, ...]:
    """Speed-ups of the stages, and the cost of misses."""
    shown = [case for case in cases if case.stage_speedup]
    if not shown:
        return ()
    groups = tuple(str(case.rows) for case in shown)
    shapes = tuple(f"{_place(case)[0]}, by rows" for case in shown)
    stages = {name: tuple(case.stage_speedup.get(name) for case in shown) for name in STAGES}
    rates = {
        f"{cost.percent} %": tuple(100 * case.misses[place].overhead for case in shown)
        for place, cost in enumerate(shown[0].misses)
    }
    return (
        Plot("Stages", "speed-up over 16 bit", groups, stages, line_at=1.0, panels=shapes),
        Plot("Calls that learn a column", "time over none, %", groups, rates, panels=shapes),
    )
