"""`mixq bench layers`: one decoder layer, by projection and whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mixq_compile.benchmarking import baselines
from mixq_compile.benchmarking.choices import (
    FP8_DYNAMIC,
    MODEL_PEERS,
    WHOLE,
    WHOLE_PEERS,
    Announce,
    check_replays,
    label,
    not_asked_for,
)
from mixq_compile.benchmarking.decoders import OneLayer, build_decoder, layer_inputs
from mixq_compile.benchmarking.environment import examine
from mixq_compile.benchmarking.linear_bench import MIXQ_WHOLE, KernelOptions, LinearBench, default_dtype
from mixq_compile.benchmarking.packed_linear import ACTIVATION, default_capacity
from mixq_compile.benchmarking.results import Document, Plot, Table, number, smallest, summarise_missing
from mixq_compile.benchmarking.shapes import LAYER_ROWS, LinearShape, ModelShape, find_model
from mixq_compile.benchmarking.timing import Floor, Timings, measure, measure_floor
from mixq_compile.benchmarking.variants import (
    EAGER_SUFFIX,
    LinearBytes,
    Variant,
    VariantOptions,
    build_variants,
    prepare,
    warm_compiler,
)
from mixq_compile.schemes.registry import get_scheme

LONGEST = 2048
"""More rows than this are several sequences of this many tokens."""
OUTLIERS = 32
"""Planted columns where single projections are timed."""


@dataclass(frozen=True)
class LayerOptions:
    """What `mixq bench layers` measures, and how."""

    model: str = "llama-2-7b"
    rows: tuple[int, ...] = LAYER_ROWS
    schemes: tuple[str, ...] = ("w8a8o16",)
    peers: tuple[str, ...] = (FP8_DYNAMIC,)
    autotune: bool = False
    replays: int = 21
    kernel: str = "auto"
    """Kernel provider of single projections."""
    lowering: str = "inductor"

    def __post_init__(self) -> None:
        check_replays(self.replays)
        find_model(self.model)


@dataclass(frozen=True)
class ProjectionTime:
    """One linear of the layer, alone."""

    projections: tuple[str, ...]
    """Those of this shape."""
    out_features: int
    in_features: int
    bits: int
    timings: Timings
    speedup: dict[str, float]
    """Time of each peer over ours."""


@dataclass(frozen=True)
class LayerCase:
    """The layer at one number of rows."""

    rows: int
    batch: int
    tokens: int
    timings: Timings
    """Of the whole layer; names that end in `, eager` are not compiled."""
    missing: dict[str, str]
    speedup: dict[str, float]
    """Time of 16 bit under Inductor over that of each compiled variant."""
    first_call_seconds: dict[str, float]
    peak_bytes: dict[str, int]
    projections: tuple[ProjectionTime, ...]


@torch.no_grad()
def run(options: LayerOptions, device: torch.device, announce: Announce, commit: str = "") -> Document:
    """Measures every number of rows."""
    shape, dtype = find_model(options.model), default_dtype(device)
    floor = measure_floor(device, options.replays)
    warm_compiler(device, options.lowering)
    projections = _projection_times(options, shape, device, floor, announce)
    model = build_decoder(shape, 1, LONGEST, dtype, device)
    chosen = VariantOptions(
        schemes=options.schemes, peers=tuple(name for name in options.peers if name in MODEL_PEERS),
        autotune=options.autotune, lowering=options.lowering,
    )  # fmt: skip
    variants, memory, missing = build_variants(OneLayer(model), chosen, [layer_inputs(model, 4, 64)])
    cases: list[LayerCase] = []
    for rows in options.rows:
        announce(len(cases), len(options.rows), f"one layer of {shape.name}, {rows} rows")
        torch.compiler.reset()
        cases.append(_case(model, variants, rows, projections[rows], options, device))
    base = baselines.float_name(dtype)
    return Document(
        benchmark="layers",
        environment=examine(device, floor, commit),
        options=options,
        cases=tuple(cases),
        summary=_summary(cases, options, memory, base),
        missing={
            **not_asked_for(options.peers, WHOLE_PEERS), **missing,
            **summarise_missing([case.missing for case in cases]),
        },
        tables=tables(cases, options, base),
        plots=plots(cases, options),
        facts={"memory": tuple(memory)},
    )  # fmt: skip


def _projection_times(
    options: LayerOptions, shape: ModelShape, device: torch.device, floor: Floor, announce: Announce
) -> dict[int, tuple[ProjectionTime, ...]]:
    """Times of each different linear of the layer, by number of rows."""
    found: dict[int, list[ProjectionTime]] = {rows: [] for rows in options.rows}
    named: dict[tuple[int, int], list[str]] = {}
    for linear in shape.projections():
        named.setdefault((linear.out_features, linear.in_features), []).append(linear.name)
    benches = [(key, bits) for key in named for bits in _widths(options.schemes)]
    for done, ((out_features, in_features), bits) in enumerate(benches):
        names = named[out_features, in_features]
        announce(done, len(benches), f"{', '.join(names)} in {bits} bit")
        linear = LinearShape(out_features, in_features, names[0])
        kernel_options = KernelOptions(
            shapes=(linear,), rows=options.rows, bits=bits, parts=(WHOLE,), peers=options.peers,
            outliers=min(OUTLIERS, default_capacity(in_features)), replays=options.replays,
            kernel=options.kernel,
        )  # fmt: skip
        bench = LinearBench.build(linear, kernel_options, device)
        for place, rows in enumerate(options.rows):
            baselines.start_over(options.peers, new_shape=place == 0)
            case = bench.case(rows, floor)
            found[rows].append(
                ProjectionTime(
                    tuple(names), out_features, in_features, bits, case.timings, case.whole_speedup
                )
            )
    return {rows: tuple(times) for rows, times in found.items()}


def _widths(schemes: Sequence[str]) -> tuple[int, ...]:
    """Bits of weight codes that the schemes have; only those whose linears the operators here compute."""
    found = [get_scheme(scheme) for scheme in schemes]
    return tuple(
        dict.fromkeys(
            scheme.weight.bits
            for scheme in found
            if scheme.outliers is not None
            and scheme.activation is not None
            and scheme.activation == ACTIVATION
        )
    )


def _case(
    model: Any,
    variants: Sequence[Variant],
    rows: int,
    projections: tuple[ProjectionTime, ...],
    options: LayerOptions,
    device: torch.device,
) -> LayerCase:
    batch = max(1, rows // LONGEST)
    tokens = rows // batch
    hidden, cosine, sine = layer_inputs(model, batch, tokens)

    def inputs(half: bool) -> dict[str, Any]:
        kind = torch.float16 if half else hidden.dtype
        return {"hidden": hidden.to(kind), "cosine": cosine.to(kind), "sine": sine.to(kind)}

    ready = prepare(variants, inputs, device, reset=lambda: None)
    timings, failed = measure(ready.calls, device, options.replays)
    base = timings[variants[0].name].median_us
    return LayerCase(
        rows=batch * tokens,
        batch=batch,
        tokens=tokens,
        timings=timings,
        missing=ready.missing | failed,
        speedup={
            name: base / timing.median_us
            for name, timing in timings.items()
            if not name.endswith(EAGER_SUFFIX) and name != variants[0].name
        },
        first_call_seconds=ready.first_call_seconds,
        peak_bytes=ready.peak_bytes,
        projections=projections,
    )


def _summary(
    cases: Sequence[LayerCase], options: LayerOptions, memory: Sequence[LinearBytes], base: str
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for scheme in options.schemes:
        ratios = [case.speedup[scheme] for case in cases]
        found[f"{scheme} over {base} under Inductor, one layer: smallest"] = smallest(ratios)
    for entry in memory:
        found[f"{entry.scheme}: memory of its linears, of 16 or 32 bit"] = entry.ratio
    return found


def tables(cases: Sequence[LayerCase], options: LayerOptions, base: str) -> tuple[Table, ...]:
    """The whole layer, and its projections."""
    names = list(dict.fromkeys(name for case in cases for name in case.timings))
    rows = tuple(
        (
            str(case.rows),
            *(number(case.timings[name].median_us if name in case.timings else None, 1) for name in names),
            *(number(case.speedup.get(scheme)) for scheme in options.schemes),
        )
        for case in cases
    )
    peers = [base, *(name for name in WHOLE_PEERS if name in options.peers)]
    projection_rows = tuple(
        (
            ", ".join(entry.projections), f"{entry.out_features}×{entry.in_features}", str(case.rows),
            str(entry.bits),
            *(number(entry.timings[name].median_us if name in entry.timings else None, 1) for name in peers),
            number(entry.timings[MIXQ_WHOLE].median_us, 1),
            *(number(entry.speedup.get(name)) for name in peers),
        )
        for case in cases
        for entry in case.projections
    )  # fmt: skip
    return (
        Table(
            f"One layer of {options.model}, µs",
            ("M", *names, *(f"{scheme} over {base}" for scheme in options.schemes)), rows,
            "Compiled variants are CUDA graphs on a GPU; eager ones are launched by Python.",
        ),
        Table(
            "Its linears alone, µs",
            ("projection", "N × K", "M", "weight bits", *map(label, peers), "mixq",
             *(f"over {label(name)}" for name in peers)),
            projection_rows,
            "Each with a quantization of its own, which the layer shares among q/k/v and among gate/up.",
        ),
    )  # fmt: skip


def plots(cases: Sequence[LayerCase], options: LayerOptions) -> tuple[Plot, ...]:
    """Speed-ups of the whole layer."""
    names = list(dict.fromkeys(name for case in cases for name in case.speedup))
    series = {name: [case.speedup.get(name) for case in cases] for name in names}
    groups = tuple(f"{case.rows} rows" for case in cases)
    return (Plot(f"One layer of {options.model}", "speed-up over 16 bit", groups, series, line_at=1.0),)
