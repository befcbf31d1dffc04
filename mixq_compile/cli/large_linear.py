"""One linear of a 7B model's shape on the GPU: what size brings, beside a demo on a small model."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from mixq_compile.cli.output import step

IN_FEATURES, OUT_FEATURES, ROWS = 4096, 11008, 1024
OUTLIERS, OUTLIER_SIZE = 32, 20.0
REPEATS = 50


def compare(scheme: str, threshold: float | None) -> dict[str, Any]:
    """Times a random linear with planted outlier columns in bf16 and under the backend, CUDA only."""
    import torch
    from torch import nn

    from mixq_compile.evaluation import relative_error

    torch.manual_seed(0)
    linear = nn.Linear(
        IN_FEATURES, OUT_FEATURES, bias=False, device="cuda", dtype=torch.bfloat16
    ).requires_grad_(False)
    x = torch.randn(ROWS, IN_FEATURES, device="cuda")
    x[:, torch.randperm(IN_FEATURES, device="cuda")[:OUTLIERS]] *= OUTLIER_SIZE
    x = x.bfloat16()
    exact = x.double() @ linear.weight.double().t()
    options: dict[str, Any] = {"scheme": scheme, "threshold": threshold, "force": True}
    fast = torch.compile(nn.Sequential(linear), backend="mixq", dynamic=False, options=options)
    calls: dict[str, Callable[..., Any]] = {"bf16 (cuBLAS)": linear, f"mixq {scheme}": fast}
    with step("a large linear"), torch.no_grad():
        outputs = {label: call(x) for label, call in calls.items()}
        times = _times(calls, x)
    baseline = times["bf16 (cuBLAS)"]
    return {
        "title": f"One linear of a 7B model's size: {OUT_FEATURES} x {IN_FEATURES}, {ROWS} tokens, "
        f"{OUTLIERS} outlier columns",
        "rows": [
            {
                "label": label,
                "microseconds": times[label],
                "speedup": baseline / times[label],
                "relative_error": relative_error(exact, outputs[label]),
            }
            for label in calls
        ],
    }


def _times(calls: dict[str, Callable[..., Any]], x: Any) -> dict[str, float]:
    """Medians in microseconds, interleaved."""
    import torch

    measured: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(REPEATS):
        for label, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call(x)
            end.record()
            torch.cuda.synchronize()
            measured[label].append(1000 * begin.elapsed_time(end))
    return {label: statistics.median(values) for label, values in measured.items()}
