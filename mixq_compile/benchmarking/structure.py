"""`mixq bench structure`: outlier columns kept in their places, against moved out of the matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mixq_compile.benchmarking.baselines import float_name
from mixq_compile.benchmarking.choices import Announce, check_replays
from mixq_compile.benchmarking.environment import examine
from mixq_compile.benchmarking.linear_bench import default_dtype
from mixq_compile.benchmarking.packed_linear import PackedLinear, default_capacity
from mixq_compile.benchmarking.permuted_linear import PermutedLinear
from mixq_compile.benchmarking.planted import planted_activation, planted_columns, random_weight
from mixq_compile.benchmarking.results import Document, Plot, Table, geometric_mean, number
from mixq_compile.benchmarking.shapes import LAYOUT_ROWS, LAYOUT_SHAPES, LinearShape
from mixq_compile.benchmarking.timing import Call, Timings, measure, measure_floor
from mixq_compile.evaluation import relative_error

OURS, PERMUTED = "order-reserved", "permuted"
GATHER, QUANTIZE, PRODUCT, WHOLE = "gather", "quantize", "product", "whole"
NEW_COLUMN = "order-reserved, one new column"
MOVE_ONE, PERMUTE_AGAIN = "permuted, one column moved", "permuted, all columns again"
PARTS = (GATHER, QUANTIZE, PRODUCT, WHOLE)


@dataclass(frozen=True)
class StructureOptions:
    """What `mixq bench structure` measures, and how."""

    shapes: tuple[LinearShape, ...] = LAYOUT_SHAPES
    rows: tuple[int, ...] = LAYOUT_ROWS
    outlier_size: float = 20.0
    replays: int = 21
    kernel: str = "auto"

    def __post_init__(self) -> None:
        check_replays(self.replays)


@dataclass(frozen=True)
class StructureCase:
    """One linear at one number of rows, with fixed outlier columns in both layouts."""

    name: str
    out_features: int
    in_features: int
    rows: int
    outlier_columns: int
    timings: Timings
    """16 bit; `<layout>: <part>`; and the changes of the set of outlier columns."""
    speedup: float
    """Time of the whole permuted linear over that of ours."""
    bytes_ours: int
    bytes_permuted: int
    difference: float
    """Between the two results, relative: they round alike."""


@torch.no_grad()
def run(options: StructureOptions, device: torch.device, announce: Announce, commit: str = "") -> Document:
    """Measures every shape at every number of rows."""
    floor = measure_floor(device, options.replays)
    cases: list[StructureCase] = []
    total = len(options.shapes) * len(options.rows)
    for shape in options.shapes:
        dtype, capacity = default_dtype(device), default_capacity(shape.in_features)
        weight = random_weight(shape.out_features, shape.in_features, dtype, device)
        linear = PackedLinear.pack(weight, 8, capacity, options.kernel).always_mixed()
        columns = planted_columns(shape.in_features, capacity)
        linear.know(columns)
        for rows in options.rows:
            announce(len(cases), total, f"{shape}, {rows} rows")
            x = planted_activation(rows, shape.in_features, columns, options.outlier_size, dtype, device)
            cases.append(_case(shape, linear, columns, x, options))
    return Document(
        benchmark="structure",
        environment=examine(device, floor, commit),
        options=options,
        cases=tuple(cases),
        summary={
            "order-reserved over permuted: geometric mean": geometric_mean(case.speedup for case in cases)
        },
        missing={},
        tables=tables(cases),
        plots=plots(cases),
    )


def _case(
    shape: LinearShape, linear: PackedLinear, columns: Sequence[int], x: Tensor, options: StructureOptions
) -> StructureCase:
    permuted = PermutedLinear.of(linear, columns)
    difference = relative_error(linear.whole(x, "static"), permuted.whole(x))
    timings, _ = measure(_calls(linear, permuted, x), x.device, options.replays)
    return StructureCase(
        name=shape.name,
        out_features=shape.out_features,
        in_features=shape.in_features,
        rows=x.shape[0],
        outlier_columns=len(columns),
        timings=timings,
        speedup=timings[_key(PERMUTED, WHOLE)].median_us / timings[_key(OURS, WHOLE)].median_us,
        bytes_ours=linear.codes.nbytes + linear.outlier_weight.nbytes,
        bytes_permuted=permuted.nbytes,
        difference=difference,
    )


def _key(layout: str, part: str) -> str:
    return f"{layout}: {part}"


def _calls(linear: PackedLinear, permuted: PermutedLinear, x: Tensor) -> dict[str, Call]:
    """Both layouts in parts and whole, and what a new outlier column costs each.

    What changes the permuted weight works on a copy of it.
    """
    ours = linear.quantize_static(x)
    gathered = permuted.gather(x)
    theirs = permuted.quantize(*gathered)
    changed = PermutedLinear.of(linear, linear.state.columns())
    stale = linear.with_own_state()
    return {
        float_name(x.dtype): Call(lambda: functional.linear(x, linear.weight)),
        _key(OURS, QUANTIZE): Call(lambda: linear.quantize_static(x)),
        _key(OURS, PRODUCT): Call(lambda: linear.multiply(x, ours)),
        _key(OURS, WHOLE): Call(lambda: linear.whole(x, "static")),
        _key(PERMUTED, GATHER): Call(lambda: permuted.gather(x)),
        _key(PERMUTED, QUANTIZE): Call(lambda: permuted.quantize(*gathered)),
        _key(PERMUTED, PRODUCT): Call(lambda: permuted.multiply(x, theirs)),
        _key(PERMUTED, WHOLE): Call(lambda: permuted.whole(x)),
        NEW_COLUMN: Call(
            lambda: stale.refresh(ours, originals=True),
            prepare=lambda: stale.cached_index[-1:].fill_(-1),
        ),
        MOVE_ONE: Call(changed.move_one),
        PERMUTE_AGAIN: Call(changed.permute_again),
    }


def tables(cases: Sequence[StructureCase]) -> tuple[Table, ...]:
    """Both layouts, and the cost of changing the set of outlier columns."""
    place = ("N × K", "M")
    keys = [_key(layout, part) for layout in (OURS, PERMUTED) for part in PARTS
            if any(_key(layout, part) in case.timings for case in cases)]  # fmt: skip
    layout_rows = tuple(
        (
            *_place(case),
            number(next(iter(case.timings.values())).median_us, 1),
            *(number(case.timings[key].median_us, 1) for key in keys),
            number(case.speedup),
            number(case.bytes_permuted / case.bytes_ours, 3),
        )
        for case in cases
    )
    changes = (NEW_COLUMN, MOVE_ONE, PERMUTE_AGAIN)
    change_rows = tuple(
        (*_place(case), *(number(case.timings[key].median_us, 1) for key in changes)) for case in cases
    )
    return (
        Table(
            "Layouts, µs", (*place, "16 bit", *keys, "permuted over order-reserved", "memory, of ours"),
            layout_rows,
            "Fixed outlier columns, as many as there are slots, the same kernels in both layouts. Permuted: "
            "activation columns are gathered first, and the integer product is that much narrower.",
        ),
        Table(
            "A new outlier column, µs", (*place, *changes), change_rows,
            "Ours fetches one column of the weight. A permuted weight exchanges two columns at best, and is "
            "written anew where the number of columns must keep its multiple.",
        ),
    )  # fmt: skip


def _place(case: StructureCase) -> tuple[str, str]:
    return f"{case.out_features}×{case.in_features}", str(case.rows)


def plots(cases: Sequence[StructureCase]) -> tuple[Plot, ...]:
    """Times of both layouts relative to 16 bit, and of changes."""
    groups = tuple(str(case.rows) for case in cases)
    shapes = tuple(f"{_place(case)[0]}, by rows" for case in cases)
    base = [next(iter(case.timings.values())).median_us for case in cases]
    layouts = {
        layout: [
            reference / case.timings[_key(layout, WHOLE)].median_us
            for case, reference in zip(cases, base, strict=True)
        ]
        for layout in (OURS, PERMUTED)
    }
    changes = {
        key: [case.timings[key].median_us for case in cases] for key in (NEW_COLUMN, MOVE_ONE, PERMUTE_AGAIN)
    }
    return (
        Plot("Layouts", "speed-up over 16 bit", groups, layouts, line_at=1.0, panels=shapes),
        Plot("A new outlier column", "µs", groups, changes, panels=shapes),
    )
