"""`mixq bench host`: what a call costs the host, of each operator and of whole layers, beside 16 bit."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixq_compile import ops, quantize
from mixq_compile.benchmarking.baselines import float_name
from mixq_compile.benchmarking.choices import Announce, check_replays
from mixq_compile.benchmarking.decoders import build_decoder
from mixq_compile.benchmarking.environment import examine
from mixq_compile.benchmarking.linear_bench import default_dtype
from mixq_compile.benchmarking.planted import generator, random_weight
from mixq_compile.benchmarking.results import Document, Plot, Table, number
from mixq_compile.benchmarking.shapes import ModelShape, find_model
from mixq_compile.benchmarking.timing import measure_floor
from mixq_compile.errors import OptionError
from mixq_compile.formats import INT8
from mixq_compile.ops.composition import MIXED_LINEAR, QUANTIZE_ONLINE, REFRESH, WEIGHT_ONLY, Step, quantized
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.scheme import DEFAULT_THRESHOLD, OutlierPolicy, WeightRecipe

COMPILED, GRAPHED, EAGER = "compiled", "compiled, CUDA graphs", "eager"
WAYS = (COMPILED, GRAPHED, EAGER)
WARM_UP = 8
"""Calls before the first that counts: compiling, and recording what launches repeat."""
CALLS_IN_A_ROW = 50
"""Of an operator, fewer than a device queues, so that the host never waits for it."""
GRAPH_MODE = "reduce-overhead"


@dataclass(frozen=True)
class HostOptions:
    """What `mixq bench host` measures, and how."""

    model: str = "llama-3-8b"
    layers: int = 4
    batches: tuple[tuple[int, int], ...] = ((4, 1024), (8, 128), (1, 16))
    """Sequences, and tokens of each."""
    ways: tuple[str, ...] = WAYS
    operator_rows: int = 128
    replays: int = 41
    lowering: str = "inductor"

    def __post_init__(self) -> None:
        check_replays(self.replays)
        most = find_model(self.model).layers
        if not 0 < self.layers <= most:
            raise OptionError(f"{self.model} has 1 to {most} layers, not {self.layers}.")


@dataclass(frozen=True)
class Times:
    """Medians of one call, in microseconds: until it returns, and on the device (None on a CPU)."""

    host_us: float
    device_us: float | None


@dataclass(frozen=True)
class LayersCase:
    """Some decoder layers run one way."""

    way: str
    sequences: int
    tokens: int
    ordinary: Times
    """In 16 bit: by Inductor, or eager."""
    mixq: Times
    host_ratio: float
    """Host time of mixq over that of 16 bit."""
    speedup: float
    """Time of 16 bit over that of mixq: on a device from its first launch to its last."""


@dataclass(frozen=True)
class OperatorCase:
    """What one call of an operator costs the host."""

    name: str
    host_us: float


@torch.no_grad()
def run(options: HostOptions, device: torch.device, announce: Announce, commit: str = "") -> Document:
    """Measures operators, then each way of running the layers at each batch."""
    floor = measure_floor(device, options.replays)
    shape = find_model(options.model)
    total = 1 + len(options.ways) * len(options.batches)
    announce(0, total, "operators")
    operators = tuple(
        OperatorCase(name, host_us(call, device, options.replays))
        for name, call in operator_calls(shape.hidden_size, options.operator_rows, device).items()
    )
    cases: list[LayersCase] = []
    missing = {} if device.type == "cuda" else {GRAPHED: "there are no CUDA graphs on a CPU"}
    ways = [way for way in options.ways if way not in missing]
    layers = Layers(shape, options, device)
    for way in ways:
        for batch in options.batches:
            announce(1 + len(cases), total, f"{way}, {batch[0]}x{batch[1]}")
            cases.append(layers.measure(way, *batch))
    return Document(
        benchmark="host",
        environment=examine(device, floor, commit),
        options=options,
        cases=tuple(cases),
        summary={
            f"{case.way}, {case.sequences}x{case.tokens}: host time over 16 bit's": case.host_ratio
            for case in cases
        },
        missing=missing,
        tables=tables(operators, cases, float_name(default_dtype(device))),
        plots=plots(cases),
        facts={"operators": operators},
    )


# Operators -------------------------------------------------------------------------------------


def operator_calls(width: int, rows: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """One call of each operator of a linear of `width` inputs and outputs, and of the 16-bit one."""
    dtype = default_dtype(device)
    policy = OutlierPolicy()
    weight = random_weight(width, width, dtype, device)
    codes, scale = quantize_weight(weight, WeightRecipe(INT8))
    capacity = policy.capacity_for(width)
    state = OutlierState.create(width, capacity, DEFAULT_THRESHOLD, device)
    state.preload(range(capacity // 4))
    x = torch.randn(rows, width, dtype=torch.float32, device=device, generator=generator(device, 0))
    given: dict[str, Any] = {
        **state.named_buffers(),
        "x": x.clamp_(-4, 4).to(dtype), "weight_codes": codes, "weight_scale": scale, "bias": None,
        "cached_index": torch.full((capacity,), -1, dtype=torch.int32, device=device),
        "outlier_weight": torch.zeros(width, capacity, dtype=dtype, device=device),
        "original": weight, "format": str(INT8), "miss": policy.miss, "small_m": 0, "kernel": "auto",
        "function": "silu", "gated": True,
    }  # fmt: skip
    quantized(given)
    lists = {**given, **{name: [given[name]] for name in REFRESH.traits.each}}
    steps = (QUANTIZE_ONLINE, MIXED_LINEAR, Step.of(ops.activated_linear), WEIGHT_ONLY)
    calls = {step.traits.name: _bound(step.operator, step.signature.pick(given)) for step in steps}
    lists = {**given, **{name: [given[name]] for name in REFRESH.traits.each}}
    calls[REFRESH.traits.name] = _bound(REFRESH.operator, REFRESH.signature.pick(lists))
    module = nn.Sequential(nn.Linear(width, width, bias=False, device=device, dtype=dtype))
    quantize(module)
    calls["linear, by its module"] = _bound(module[0], (given["x"],))
    return {**calls, f"{float_name(dtype)} linear": _bound(functional.linear, (given["x"], weight))}


def _bound(operator: Callable[..., object], arguments: Sequence[Any]) -> Callable[[], object]:
    return lambda: operator(*arguments)


def host_us(call: Callable[[], object], device: torch.device, replays: int) -> float:
    """Median time until a call returns, in microseconds, of several calls in a row."""
    samples = []
    for _ in range(WARM_UP):
        call()
    for _ in range(replays):
        _wait(device)
        begin = time.perf_counter()
        for _ in range(CALLS_IN_A_ROW):
            call()
        samples.append((time.perf_counter() - begin) / CALLS_IN_A_ROW * 1e6)
    _wait(device)
    return statistics.median(samples)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Layers ----------------------------------------------------------------------------------------


class Layers:
    """Some decoder layers by configuration, in 16 bit and quantized."""

    def __init__(self, shape: ModelShape, options: HostOptions, device: torch.device) -> None:
        self._options, self._device = options, device
        positions = max(tokens for _, tokens in options.batches)
        self._ordinary = build_decoder(shape, options.layers, positions, default_dtype(device), device).model
        self._width = shape.hidden_size
        self._swapped: Any = None

    def measure(self, way: str, sequences: int, tokens: int) -> LayersCase:
        """One way at one batch; both take turns."""
        x = torch.randn(
            sequences, tokens, self._width,
            dtype=torch.float32, device=self._device, generator=generator(self._device, 1),
        ).to(default_dtype(self._device))  # fmt: skip
        torch.compiler.reset()
        calls = {
            name: _forward(model, x, graphed=way == GRAPHED) for name, model in self._models(way).items()
        }
        times = in_turns(calls, self._device, self._options.replays)
        ordinary, mixq = times["ordinary"], times["mixq"]
        return LayersCase(
            way, sequences, tokens, ordinary, mixq,
            host_ratio=mixq.host_us / ordinary.host_us,
            speedup=(ordinary.device_us or ordinary.host_us) / (mixq.device_us or mixq.host_us),
        )  # fmt: skip

    def _models(self, way: str) -> dict[str, Callable[..., Any]]:
        if way == EAGER:
            if self._swapped is None:
                self._swapped = copy.deepcopy(self._ordinary)
                quantize(self._swapped)
            return {"ordinary": self._ordinary, "mixq": self._swapped}
        lowering = {} if self._options.lowering == "inductor" else {"lowering": self._options.lowering}
        mode = {"mode": GRAPH_MODE} if way == GRAPHED else {}
        ordinary = "inductor" if self._options.lowering == "inductor" else "eager"
        return {
            "ordinary": torch.compile(self._ordinary, backend=ordinary, **mode),  # type: ignore[call-overload]
            "mixq": torch.compile(self._ordinary, backend="mixq", options={**lowering, **mode}),
        }


def _forward(model: Callable[..., Any], x: Tensor, *, graphed: bool) -> Callable[[], object]:
    def call() -> object:
        if graphed:
            torch.compiler.cudagraph_mark_step_begin()
        return model(inputs_embeds=x, use_cache=False)

    return call


def in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, replays: int
) -> dict[str, Times]:
    """Medians of calls that take turns, each on an idle device."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    host: dict[str, list[float]] = {name: [] for name in calls}
    busy: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(replays):
        for name, call in calls.items():
            _wait(device)
            if device.type != "cuda":
                begin = time.perf_counter()
                call()
                host[name].append((time.perf_counter() - begin) * 1e6)
                continue
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            begin = time.perf_counter()
            call()
            host[name].append((time.perf_counter() - begin) * 1e6)
            last.record()
            _wait(device)
            busy[name].append(first.elapsed_time(last) * 1e3)
    return {
        name: Times(
            statistics.median(host[name]), statistics.median(busy[name]) if busy[name] else None
        )
        for name in calls
    }  # fmt: skip


# Reading ---------------------------------------------------------------------------------------


def tables(operators: Sequence[OperatorCase], cases: Sequence[LayersCase], dtype: str) -> tuple[Table, ...]:
    """The layers, and the operators."""
    rows = tuple(
        (
            case.way, f"{case.sequences} × {case.tokens}",
            _milliseconds(case.ordinary.host_us), _milliseconds(case.mixq.host_us), number(case.host_ratio),
            _milliseconds(case.ordinary.device_us), _milliseconds(case.mixq.device_us), number(case.speedup),
        )
        for case in cases
    )  # fmt: skip
    columns = (
        "way", "tokens", f"host, {dtype}", "host, mixq", "mixq over it", f"device, {dtype}", "device, mixq",
        "speed-up",
    )  # fmt: skip
    return (
        Table(
            "Layers, ms", columns, rows,
            "Host: until a call returns. Device: from a call's first event to its last, which includes "
            "waiting for the host. The compiled 16-bit layers are Inductor's.",
        ),
        Table(
            "Operators, µs of the host", ("operator", "µs"),
            tuple((case.name, number(case.host_us, 1)) for case in operators),
        ),
    )  # fmt: skip


def _milliseconds(microseconds: float | None) -> str:
    return "–" if microseconds is None else number(microseconds / 1e3)


def plots(cases: Sequence[LayersCase]) -> tuple[Plot, ...]:
    """Host times of both, by way."""
    groups = tuple(f"{case.sequences}x{case.tokens}" for case in cases)
    series = {
        "16 bit": [case.ordinary.host_us / 1e3 for case in cases],
        "mixq": [case.mixq.host_us / 1e3 for case in cases],
    }
    return (Plot("Host time", "ms", groups, series, panels=tuple(case.way for case in cases)),)
