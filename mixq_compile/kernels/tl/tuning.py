"""Measures on the GPU at hand what a quantized linear gains over the 16-bit one."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from mixq_compile.kernels.tl.speed_table import SpeedTable
from mixq_compile.ops.composition import compose
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.providers import KernelQuery, linear_query, small_batch_limit
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.scheme import OutlierPolicy, WeightRecipe
from mixq_compile.thresholds import DEFAULT_THRESHOLD

REPLAYS = 15
WARM_UP = 3
L2_FLUSH_BYTES = 256 << 20
KERNEL = "tl"


def can_measure(query: KernelQuery) -> bool:
    """Whether there is a GPU that no graph is being captured on, and a shape to measure."""
    known = query.in_features is not None and query.out_features is not None
    return known and query.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _graph_of(function: Callable[[], Tensor], device: torch.device) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph


def _ratio_of_times(first: Callable[[], Tensor], second: Callable[[], Tensor], device: torch.device) -> float:
    """Median time of the first over that of the second: turn by turn, in graphs, the L2 cache flushed."""
    graphs = [_graph_of(function, device) for function in (first, second)]
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
    events: tuple[list[tuple[torch.cuda.Event, torch.cuda.Event]], ...] = ([], [])
    for _ in range(REPLAYS):
        for graph, seen in zip(graphs, events, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            graph.replay()
            end.record()
            seen.append((begin, end))
    torch.cuda.synchronize(device)
    ordinary, quantized = (
        statistics.median(begin.elapsed_time(end) for begin, end in seen) for seen in events
    )
    return float(ordinary / quantized)


def measure(query: KernelQuery, rows: int) -> float:
    """Time of the 16-bit linear over quantization, check and product together, at `rows` rows."""
    features, columns, device = query.out_features or 0, query.in_features or 0, query.device
    with torch.no_grad(), torch.cuda.device(device):
        x = torch.randn(rows, columns, dtype=torch.float32, device=device).clamp_(-4, 4).to(query.dtype)
        weight = torch.randn(features, columns, device=device, dtype=query.dtype)
        codes, scale = quantize_weight(weight, WeightRecipe(query.weight))
        capacity = OutlierPolicy().capacity_for(columns)
        state = OutlierState.create(columns, capacity, DEFAULT_THRESHOLD, device)
        state.preload(range(min(capacity, columns) // 2))
        given = {
            **state.named_buffers(),
            "x": x,
            "weight_codes": codes,
            "weight_scale": scale,
            "bias": None,
            "cached_index": torch.full((capacity,), -1, dtype=torch.int32, device=device),
            "outlier_weight": torch.zeros(features, capacity, dtype=query.dtype, device=device),
            "original": weight,
            "format": "int8",
            "miss": "exact",
            "small_m": small_batch_limit(linear_query(x, features, columns, query.weight), KERNEL),
            "kernel": KERNEL,
        }
        return _ratio_of_times(
            lambda: torch.nn.functional.linear(x, weight),
            lambda: compose(dict(given), refreshes=True),
            device,
        )


def measure_into(table: SpeedTable, query: KernelQuery, rows: int) -> float:
    """Measures one point and adds it to a table."""
    speedup = measure(query, rows)
    table.add((query.weight.bits, query.out_features or 0, query.in_features or 0), rows, speedup)
    return speedup
