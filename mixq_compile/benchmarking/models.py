"""`mixq bench model`: prefill, decode, and one token without a cache; time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixq_compile.benchmarking.baselines import float_name
from mixq_compile.benchmarking.choices import (
    DECODE,
    KINDS,
    MODEL_PEERS,
    PREFILL,
    SINGLE,
    Announce,
    check_replays,
    not_asked_for,
)
from mixq_compile.benchmarking.decoders import build_decoder, random_tokens, set_attention
from mixq_compile.benchmarking.environment import examine
from mixq_compile.benchmarking.linear_bench import default_dtype
from mixq_compile.benchmarking.results import Document, Plot, Table, number, smallest, summarise_missing
from mixq_compile.benchmarking.shapes import ModelShape, find_model
from mixq_compile.benchmarking.timing import PeerMissing, Timings, measure, measure_floor
from mixq_compile.benchmarking.variants import (
    EAGER_SUFFIX,
    LinearBytes,
    Variant,
    VariantOptions,
    build_variants,
    prepare,
    warm_compiler,
)
from mixq_compile.benchmarking.workloads import Inputs, Workload, make_inputs
from mixq_compile.errors import OptionError

CACHE_IN_BF16 = "runs in fp16, and the cache is in bf16"
CALIBRATION_BATCHES, CALIBRATION_BATCH, CALIBRATION_TOKENS = 2, 4, 128


@dataclass(frozen=True)
class ModelOptions:
    """What `mixq bench model` measures, and how."""

    model: str = "llama-2-7b"
    layers: int = 8
    kinds: tuple[str, ...] = KINDS
    batches: tuple[int, ...] = (1, 32, 256)
    """Of decoding."""
    contexts: tuple[int, ...] = (128, 1024, 4096)
    """Tokens in the cache while decoding."""
    prefill: tuple[int, int] = (8, 2048)
    """Sequences, and tokens of each."""
    single_batches: tuple[int, ...] = (32, 128, 512)
    """Of one token without a cache."""
    schemes: tuple[str, ...] = ("w8a8o16",)
    peers: tuple[str, ...] = ()
    autotune: bool = False
    eager: bool = True
    """Time the uncompiled models too."""
    replays: int = 15
    lowering: str = "inductor"

    def __post_init__(self) -> None:
        check_replays(self.replays)
        most = find_model(self.model).layers
        if not 0 < self.layers <= most:
            raise OptionError(f"{self.model} has 1 to {most} layers, not {self.layers}.")

    def workloads(self) -> tuple[Workload, ...]:
        """Everything that is measured, in order."""
        made: list[Workload] = []
        if PREFILL in self.kinds:
            made.append(Workload(PREFILL, *self.prefill))
        if DECODE in self.kinds:
            made += [
                Workload(DECODE, batch, 1, context) for context in self.contexts for batch in self.batches
            ]
        if SINGLE in self.kinds:
            made += [Workload(SINGLE, batch, 1) for batch in self.single_batches]
        return tuple(made)


@dataclass(frozen=True)
class ModelCase:
    """One workload, all variants taking turns."""

    workload: str
    kind: str
    batch: int
    tokens: int
    context: int
    timings: Timings
    """Names that end in `, eager` are not compiled."""
    missing: dict[str, str]
    speedup: dict[str, float]
    """Time of 16 bit under Inductor over that of each compiled variant."""
    eager_speedup: dict[str, float]
    """Time of 16 bit without compilation over that of each other variant without compilation."""
    tokens_per_second: dict[str, float]
    first_call_seconds: dict[str, float]
    peak_bytes: dict[str, int]


@torch.no_grad()
def run(options: ModelOptions, device: torch.device, announce: Announce, commit: str = "") -> Document:
    """Measures every workload."""
    shape, dtype = find_model(options.model), default_dtype(device)
    floor = measure_floor(device, options.replays)
    warm_compiler(device, options.lowering)
    workloads = options.workloads()
    longest = max((workload.context + workload.tokens for workload in workloads), default=1)
    announce(0, len(workloads), f"building {options.layers} layers of {shape.name}")
    model = build_decoder(shape, options.layers, longest, dtype, device)
    batches = [
        random_tokens(model, CALIBRATION_BATCH, min(CALIBRATION_TOKENS, longest), seed)
        for seed in range(CALIBRATION_BATCHES)
    ]
    chosen = VariantOptions(options.schemes, options.peers, options.autotune, options.lowering)
    variants, memory, missing = build_variants(model, chosen, batches)
    cases: list[ModelCase] = []
    too_large: dict[str, str] = {}
    for done, workload in enumerate(workloads):
        announce(done, len(workloads), str(workload))
        torch.compiler.reset()
        try:
            inputs = make_inputs(workload, model, shape, options.layers, device, dtype)
        except PeerMissing as error:
            too_large[str(workload)] = str(error)
            continue
        cases.append(_case(workload, variants, inputs, options, device))
        # Its cache must be gone before the next one is made.
        del inputs
    base = float_name(dtype)
    return Document(
        benchmark="model",
        environment=examine(device, floor, commit),
        options=options,
        cases=tuple(cases),
        summary=_summary(cases, options, memory, base),
        missing={
            **not_asked_for(options.peers, MODEL_PEERS), **missing, **too_large,
            **summarise_missing([case.missing for case in cases]),
        },
        tables=tables(cases, options, memory, shape, base),
        plots=plots(cases, options),
        facts={"memory": tuple(memory)},
    )  # fmt: skip


def _case(
    workload: Workload, variants: Sequence[Variant], inputs: Inputs, options: ModelOptions,
    device: torch.device,
) -> ModelCase:  # fmt: skip
    fitting = [variant for variant in variants if not (variant.half and inputs.cache_bytes)]
    missing = {variant.name: CACHE_IN_BF16 for variant in variants if variant not in fitting}
    for variant in fitting:
        set_attention(variant.module, masked=workload.kind == DECODE)
    ready = prepare(
        fitting, lambda half: inputs.given, device, reset=inputs.reset, held_bytes=inputs.cache_bytes
    )
    calls = {
        name: call for name, call in ready.calls.items() if options.eager or not name.endswith(EAGER_SUFFIX)
    }
    timings, failed = measure(calls, device, options.replays)
    base = variants[0].name
    medians = {name: timing.median_us for name, timing in timings.items()}
    eager = {
        name.removesuffix(EAGER_SUFFIX): value
        for name, value in medians.items()
        if name.endswith(EAGER_SUFFIX)
    }
    compiled = {name: value for name, value in medians.items() if not name.endswith(EAGER_SUFFIX)}
    return ModelCase(
        workload=str(workload),
        kind=workload.kind,
        batch=workload.batch,
        tokens=workload.tokens,
        context=workload.context,
        timings=timings,
        missing=missing | ready.missing | failed,
        speedup={name: compiled[base] / value for name, value in compiled.items() if name != base},
        eager_speedup={name: eager[base] / value for name, value in eager.items() if name != base},
        tokens_per_second={
            name: workload.batch * workload.tokens / value * 1e6 for name, value in medians.items()
        },
        first_call_seconds=ready.first_call_seconds,
        peak_bytes=ready.peak_bytes,
    )


def _summary(
    cases: Sequence[ModelCase], options: ModelOptions, memory: Sequence[LinearBytes], base: str
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for scheme in options.schemes:
        for kind in options.kinds:
            ratios = [case.speedup[scheme] for case in cases if case.kind == kind]
            found[f"{scheme} over {base} under Inductor, {kind}: smallest"] = smallest(ratios)
        seconds = [case.first_call_seconds[scheme] for case in cases]
        found[f"{scheme}: longest first call, seconds"] = max(seconds, default=None)
    for entry in memory:
        found[f"{entry.scheme}: memory of its linears, of 16 or 32 bit"] = entry.ratio
    return found


def tables(
    cases: Sequence[ModelCase],
    options: ModelOptions,
    memory: Sequence[LinearBytes],
    shape: ModelShape,
    base: str,
) -> tuple[Table, ...]:
    """Times and speed-ups, compilation and memory."""
    names = list(dict.fromkeys(name for case in cases for name in case.timings))
    compiled = [name for name in names if not name.endswith(EAGER_SUFFIX)]
    others = [name for name in compiled if name != base]
    times = tuple(
        (
            case.workload,
            *(_milliseconds(case, name) for name in names),
            *(number(case.speedup.get(name)) for name in others),
            *(number(case.eager_speedup.get(name)) for name in others),
        )
        for case in cases
    )
    columns = (
        "", *names, *(f"{name} over {base}" for name in others),
        *(f"{name} over {base}, both eager" for name in others),
    )  # fmt: skip
    costs = tuple(
        (
            case.workload,
            *(number(case.first_call_seconds.get(name), 1) for name in compiled),
            *(_gibibytes(case.peak_bytes.get(name)) for name in compiled),
        )
        for case in cases
    )
    held = tuple(
        (entry.scheme, str(entry.linears), _gibibytes(entry.bytes_before), _gibibytes(entry.bytes_after),
         number(entry.ratio, 3))
        for entry in memory
    )  # fmt: skip
    return (
        Table(
            f"{options.layers} of {shape.layers} layers of {shape.name}, ms", columns, times,
            "Compiled variants are CUDA graphs on a GPU; eager ones are launched by Python. The output head "
            "and attention are the same in all.",
        ),
        Table(
            "First call and memory",
            ("", *(f"{name}, s" for name in compiled), *(f"{name}, peak GiB" for name in compiled)), costs,
            "First call: compilation included, without Inductor's caches. Peak: the variant's weights, the "
            "cache, and the most that a call takes beside them.",
        ),
        Table(
            "Memory of the quantized linears",
            ("scheme", "linears", "before GiB", "after GiB", "ratio"), held,
            "Codes, scales, outlier weights and states; the 16-bit weights are freed.",
        ),
    )  # fmt: skip


def _milliseconds(case: ModelCase, name: str) -> str:
    return number(case.timings[name].median_us / 1000 if name in case.timings else None, 3)


def _gibibytes(count: float | None) -> str:
    return number(None if count is None else count / 2**30, 3)


def plots(cases: Sequence[ModelCase], options: ModelOptions) -> tuple[Plot, ...]:
    """Speed-ups of every workload."""
    names = list(dict.fromkeys(name for case in cases for name in case.speedup))
    series = {name: [case.speedup.get(name) for case in cases] for name in names}
    groups = tuple(case.workload for case in cases)
    title = f"{options.model}, {options.layers} layers"
    return (Plot(title, "speed-up over 16 bit under Inductor", groups, series, line_at=1.0),)
