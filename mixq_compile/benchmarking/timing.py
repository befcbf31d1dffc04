"""Times calls beside each other: on a GPU as CUDA graphs with the L2 cache flushed, on a CPU by the clock.

All calls of one comparison take turns, in another order each round, so that clocks, temperature and
noise hit all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixq_compile.errors import MixqError

WARM_UP = 3
"""Calls before a capture, and rounds that are run but not counted."""
L2_FLUSH_BYTES = 256 << 20
COPY_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
FIRST_LINE = 160


class PeerMissing(MixqError):
    """A baseline cannot run here; the message says why."""


def nothing() -> None:
    """Prepares nothing."""


@dataclass(frozen=True)
class Call:
    """One thing to time."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing
    """Called before each run, outside the time: brings back what a run changes."""
    begin: Callable[[], object] = nothing
    """Called once, after warming up."""
    graphed: bool = True
    """On a GPU, replayed as a CUDA graph; False for calls that wait for the device."""
    optional: bool = False
    """True for a peer: where it fails, the reason is recorded in place of a time."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median and the tenth and ninetieth percentiles."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    graphed: bool
    """True for a CUDA graph, so that Python's own time is not in it."""

    @classmethod
    def of(cls, microseconds: Sequence[float], graphed: bool) -> Timing:
        """Percentiles of single measurements."""
        deciles = statistics.quantiles(microseconds, n=10, method="inclusive")
        return cls(statistics.median(microseconds), deciles[0], deciles[-1], len(microseconds), graphed)


Timings = dict[str, Timing]


def measure(calls: Mapping[str, Call], device: torch.device, replays: int) -> tuple[Timings, dict[str, str]]:
    """Times every call `replays` times, interleaved.

    Returns the times by name and, for each optional call that failed, the reason.
    """
    samples, missing = sample(calls, device, replays)
    graphed = {name: device.type == "cuda" and calls[name].graphed for name in samples}
    return {name: Timing.of(values, graphed[name]) for name, values in samples.items()}, missing


def sample(
    calls: Mapping[str, Call], device: torch.device, replays: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The single measurements behind `measure`, in microseconds."""
    prepared: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    for name, call in calls.items():
        try:
            prepared[name] = _ready(call, device)
        except Exception as error:
            if not call.optional:
                raise
            missing[name] = first_line(error)
    for name in prepared:
        calls[name].begin()
    timed = _timed_on_gpu(calls, prepared, replays) if device.type == "cuda" else _timed_on_cpu(
        calls, prepared, replays)  # fmt: skip
    return timed, missing


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with its type where it is not one of ours."""
    text = str(error).strip().split("\n")[0][:FIRST_LINE]
    return text if isinstance(error, MixqError) else f"{type(error).__name__}: {text}"


def _ready(call: Call, device: torch.device) -> Callable[[], object]:
    """The call, warm; on a GPU its captured graph."""
    if device.type != "cuda":
        call.prepare()
        call.run()
        return call.run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call.prepare()
            call.run()
    stream.synchronize()
    if not call.graphed:
        return call.run
    call.prepare()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # The result is kept by the graph's own memory pool, not by a Python name.
        call.run()
    return graph.replay


def _turns(names: Sequence[str], replays: int) -> list[tuple[bool, str]]:
    """Whose turn it is, and whether it counts: each name once a round, another first each time."""
    turns = []
    for number in range(WARM_UP + replays):
        shift = number % len(names) if names else 0
        turns += [(number >= WARM_UP, name) for name in (*names[shift:], *names[:shift])]
    return turns


def _timed_on_gpu(
    calls: Mapping[str, Call], prepared: Mapping[str, Callable[[], object]], replays: int
) -> dict[str, list[float]]:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = []
    for counts, name in _turns(list(prepared), replays):
        calls[name].prepare()
        flush.zero_()
        if not calls[name].graphed:
            # Else its launches would wait in the queue behind others, and their own time would not show.
            torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        prepared[name]()
        end.record()
        if counts:
            events.append((name, begin, end))
    torch.cuda.synchronize()
    timed: dict[str, list[float]] = {name: [] for name in prepared}
    for name, begin, end in events:
        timed[name].append(1000 * begin.elapsed_time(end))
    return timed


def _timed_on_cpu(
    calls: Mapping[str, Call], prepared: Mapping[str, Callable[[], object]], replays: int
) -> dict[str, list[float]]:
    timed: dict[str, list[float]] = {name: [] for name in prepared}
    for counts, name in _turns(list(prepared), replays):
        calls[name].prepare()
        begin = time.perf_counter()
        prepared[name]()
        elapsed = time.perf_counter() - begin
        if counts:
            timed[name].append(1e6 * elapsed)
    return timed


@dataclass(frozen=True)
class Floor:
    """What the device does at best, measured in the same way as everything else."""

    copy_bytes_per_second: float
    """Bytes read and written by a copy within the device's memory."""
    launch_us: float
    """A launch that does nothing worth naming; it is in every other time."""


def measure_floor(device: torch.device, replays: int) -> Floor:
    """Copy bandwidth, of the fastest way to copy, and the time of an empty launch."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, dtype=torch.int32, device=device)
    target, one = torch.empty_like(source), source[:1]
    copies = {
        "graph": Call(lambda: target.copy_(source)),
        # A copy node in a graph is slower than the same copy launched: 2.8 against 4.3 TB/s on an H200.
        "launched": Call(lambda: target.copy_(source), graphed=False),
        "kernel": Call(lambda: torch.bitwise_not(source, out=target)),
    }
    timings, _ = measure({**copies, "launch": Call(lambda: one.zero_())}, device, replays)
    fastest = min(timings[name].median_us for name in copies)
    return Floor(2 * source.nbytes / (fastest * 1e-6), timings["launch"].median_us)


def keep_busy(device: torch.device, launches: int = 600, size: int = 8192) -> Tensor:
    """Queues products that keep the device's tensor cores busy for a while, and does not wait."""
    # Random numbers: zeros draw so little power that the clocks never fall.
    matrix = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    result = torch.empty_like(matrix)
    for _ in range(launches):
        torch.mm(matrix, matrix, out=result)
    return result
