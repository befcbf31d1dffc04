"""`mixq bench kernels`: one linear, the product alone and the whole operator, beside its peers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixq_compile.benchmarking import baselines
from mixq_compile.benchmarking.choices import (
    GEMM,
    PEERS,
    PRODUCT_PEERS,
    WHOLE,
    WHOLE_PEERS,
    Announce,
    label,
    not_asked_for,
)
from mixq_compile.benchmarking.environment import examine
from mixq_compile.benchmarking.linear_bench import (
    CHECKED,
    MIXQ_GEMM,
    MIXQ_WHOLE,
    ONLINE,
    STATIC,
    KernelCase,
    KernelOptions,
    LinearBench,
    default_dtype,
)
from mixq_compile.benchmarking.results import (
    Document,
    Plot,
    Table,
    geometric_mean,
    number,
    smallest,
    summarise_missing,
)
from mixq_compile.benchmarking.timing import Timing, measure_floor

MANY_ROWS = 1024
"""Geometric means are taken over this many rows and more."""


@torch.no_grad()
def run(options: KernelOptions, device: torch.device, announce: Announce, commit: str = "") -> Document:
    """Measures every shape at every number of rows."""
    floor = measure_floor(device, options.replays)
    cases: list[KernelCase] = []
    total = len(options.shapes) * len(options.rows)
    for shape in options.shapes:
        bench = LinearBench.build(shape, options, device)
        for place, rows in enumerate(options.rows):
            announce(len(cases), total, f"{shape}, {rows} rows")
            baselines.start_over(options.peers, new_shape=place == 0)
            cases.append(bench.case(rows, floor))
    float_name = baselines.float_name(default_dtype(device))
    summary = summarise(cases, float_name)
    missing = summarise_missing([case.missing for case in cases])
    return Document(
        benchmark="kernels",
        environment=examine(device, floor, commit),
        options=options,
        cases=tuple(cases),
        summary=summary,
        missing={**not_asked_for(options.peers, PEERS), **missing},
        tables=tables(cases, float_name),
        plots=plots(cases, float_name),
    )


def summarise(cases: Sequence[KernelCase], float_name: str) -> dict[str, float | None]:
    """Geometric means over the cases with many rows, and the smallest speed-up over 16 bit of all."""
    many = [case for case in cases if case.rows >= MANY_ROWS]
    found: dict[str, float | None] = {}
    kinds = {
        "product": (GEMM, (float_name, *PRODUCT_PEERS)),
        "whole": (WHOLE, (float_name, *WHOLE_PEERS)),
    }
    for kind, (part, peers) in kinds.items():
        for peer in peers:
            ratios = [case.speedups(part).get(peer) for case in many]
            name = f"{kind} over {label(peer)}, {MANY_ROWS} rows and more"
            found[f"{name}: geometric mean"] = geometric_mean(ratios)
            found[f"{name}: smallest"] = smallest(ratios)
        found[f"{kind} over {float_name}, all rows: smallest"] = smallest(
            case.speedups(part).get(float_name) for case in cases
        )
    return {name: value for name, value in found.items() if value is not None}


def tables(cases: Sequence[KernelCase], float_name: str) -> tuple[Table, ...]:
    """Times of the product, of the whole linear and of the quantization, and errors."""
    made = [
        _comparison(
            "The product alone, µs", cases, (float_name, *PRODUCT_PEERS), MIXQ_GEMM, GEMM,
            "Operands quantized before; int_mm has no outlier columns and leaves int32 behind.",
        ),
        _comparison(
            "The whole linear, µs", cases, (float_name, *WHOLE_PEERS), MIXQ_WHOLE, WHOLE,
            "Quantization, check for new outlier columns and product.",
        ),
        _quantization(cases),
        _errors(cases),
    ]  # fmt: skip
    return tuple(table for table in made if table.rows)


def _comparison(
    title: str, cases: Sequence[KernelCase], peers: Sequence[str], own: str, part: str, note: str
) -> Table:
    shown = [case for case in cases if own in case.timings]
    measured = [name for name in peers if any(name in case.timings for case in shown)]
    columns = ["N × K", "M", "path", *(label(name) for name in measured), "mixq", "p10–p90"]
    columns += ["TFLOP/s", *(f"over {label(name)}" for name in measured)]
    rows = []
    for case in shown:
        timing = case.timings[own]
        operations = 2 * case.rows * case.out_features * case.in_features
        rows.append(
            (
                *_place(case),
                case.path,
                *(_median(case.timings.get(name)) for name in measured),
                _median(timing),
                f"{timing.p10_us:.1f}–{timing.p90_us:.1f}",
                number(operations / timing.median_us * 1e-6, 1),
                *(number(case.speedups(part).get(name)) for name in measured),
            )
        )
    return Table(title, tuple(columns), tuple(rows), note)


def _place(case: KernelCase) -> tuple[str, str]:
    return f"{case.out_features}×{case.in_features}", str(case.rows)


def _median(timing: Timing | None) -> str:
    return number(timing.median_us if timing else None, 1)


def _quantization(cases: Sequence[KernelCase]) -> Table:
    rows: dict[tuple[int, int], tuple[str, ...]] = {}
    for case in cases:
        cost = case.quantization
        if cost is None or (case.in_features, case.rows) in rows:
            continue
        rows[case.in_features, case.rows] = (
            str(case.in_features), str(case.rows), f"{cost.bytes_moved / 2**20:.1f}",
            *(_median(case.timings[name]) for name in (STATIC, ONLINE, CHECKED)),
            f"{cost.static_share:.0%}", f"{cost.online_share:.0%}", number(cost.check_us, 1),
        )  # fmt: skip
    columns = (
        "K", "M", "MiB moved", "static µs", "online µs", "online and refresh µs", "static, of copy",
        "online, of copy", "check µs",
    )  # fmt: skip
    note = (
        "Bytes moved over time, as a share of the measured copy bandwidth; check: online and refresh "
        "without a new column, less static."
    )
    return Table("Quantization", columns, tuple(rows.values()), note)


def _errors(cases: Sequence[KernelCase]) -> Table:
    shown = [case for case in cases if case.errors]
    names = list(dict.fromkeys(name for case in shown for name in case.errors))
    rows = tuple((*_place(case), *(number(case.errors.get(name), 4) for name in names)) for case in shown)
    note = "Frobenius norms against float64; scheme: its float64 simulation, the floor of any kernel."
    return Table("Relative errors", ("N × K", "M", *map(label, names)), rows, note)


def plots(cases: Sequence[KernelCase], float_name: str) -> tuple[Plot, ...]:
    """Speed-ups of the product and of the whole linear."""
    made = []
    for part, own, title, peers in (
        (GEMM, MIXQ_GEMM, "The product alone", (float_name, *PRODUCT_PEERS)),
        (WHOLE, MIXQ_WHOLE, "The whole linear", (float_name, *WHOLE_PEERS)),
    ):
        shown = [case for case in cases if own in case.timings]
        series = {
            f"over {label(name)}": tuple(case.speedups(part).get(name) for case in shown)
            for name in peers
            if any(name in case.timings for case in shown)
        }
        groups = tuple(str(case.rows) for case in shown)
        shapes = tuple(f"{case.out_features}×{case.in_features}, by rows" for case in shown)
        if groups:
            made.append(Plot(f"{title}: speed-up", "speed-up", groups, series, line_at=1.0, panels=shapes))
    return tuple(made)
