"""One linear of a 7B model's shape on the GPU: what size brings, beside a demo on a small model."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from mixq_compile.cli.output import step

IN_FEATURES, OUT_FEATURES, ROWS = 4096, 11008, 1024
OUTLIERS, OUTLIER_SIZE = 32, 20.0
BASELINE = "bf16 (cuBLAS)"
WARM_UP, REPEATS = 3, 50
FLUSH_BYTES = 1 << 28
"""Written before each timed call: the weight must come from memory, as in a model, not from the cache."""


def compare(scheme: str, threshold: float | str | None) -> dict[str, Any]:
    """Times a random linear with planted outlier columns in bf16 and under the backend; CUDA only."""
    import torch
    from torch import nn

    from mixq_compile.evaluation import relative_error

    torch.manual_seed(0)
    linear = nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False, device="cuda", dtype=torch.bfloat16)
    linear.requires_grad_(False)
    x = torch.randn(ROWS, IN_FEATURES, dtype=torch.float32, device="cuda")
    order = torch.randperm(IN_FEATURES, dtype=torch.int64, device="cuda")
    x[:, order[:OUTLIERS]] *= OUTLIER_SIZE
    x = x.bfloat16()
    exact = x.double() @ linear.weight.double().t()
    options: dict[str, Any] = {"scheme": scheme, "threshold": threshold, "force": True}
    fast = torch.compile(nn.Sequential(linear), backend="mixq", dynamic=False, options=options)
    calls: dict[str, Callable[..., Any]] = {BASELINE: linear, f"mixq {scheme}": fast}
    with step("a large linear"), torch.no_grad():
        captured = {label: _captured(call, x) for label, call in calls.items()}
        times = _times({label: graph for label, (graph, _) in captured.items()})
    return {
        "title": f"One linear of a 7B model's size ({OUT_FEATURES} x {IN_FEATURES}), {ROWS} tokens with "
        f"{OUTLIERS} outlier columns, as CUDA graphs",
        "rows": [
            {
                "label": label,
                "microseconds": times[label],
                "speedup": times[BASELINE] / times[label],
                "relative_error": relative_error(exact, output),
            }
            for label, (_, output) in captured.items()
        ],
    }


def _captured(call: Callable[..., Any], x: Any) -> tuple[Any, Any]:
    """A call as a CUDA graph, so that the time is the device's and not that of Python; and its output."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(x)
    graph.replay()
    torch.cuda.synchronize()
    return graph, output


def _times(graphs: dict[str, Any]) -> dict[str, float]:
    """Medians in microseconds, interleaved."""
    import torch

    flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    measured: dict[str, list[float]] = {label: [] for label in graphs}
    for _ in range(REPEATS):
        for label, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            measured[label].append(1000 * begin.elapsed_time(end))
    return {label: statistics.median(values) for label, values in measured.items()}
