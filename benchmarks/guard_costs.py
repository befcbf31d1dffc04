"""What each guard of a call costs on the CPU: writes results/guard_costs_cpu.json.

With and without a guard take turns in one process; medians of microseconds a call. Calls vary by more than
a guard takes, so that its own time, measured alone, stands beside them.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.benchmarking.environment import examine
from mixq_compile.benchmarking.timing import measure_floor
from mixq_compile.ops.state_access import STATES
from mixq_compile.runtime import compiled_graph, weight_watch
from mixq_compile.runtime.weight_watch import WeightWatch

ROUNDS = 40
CALLS = 50
RESULTS = Path(__file__).parent / "results" / "guard_costs_cpu.json"
SHAPES = ((64, 256, 256), (512, 1024, 1024))
NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def replaced(owner: object, **values: object) -> Iterator[None]:
    """Attributes of a module or class with other values for a while."""
    kept = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


def without_module_access() -> AbstractContextManager[None]:
    """Swapped modules that do not look for other threads' calls."""
    return replaced(sys.modules["mixq_compile.ops.linear"], state_access=lambda device, learns: NOTHING)


def without_graph_access() -> AbstractContextManager[None]:
    """Compiled graphs that do not look for other threads' calls."""
    return replaced(compiled_graph.CompiledGraph, access=lambda self: NOTHING)


def without_watch() -> AbstractContextManager[None]:
    """Compiled graphs that do not look at the content of weights."""
    return replaced(WeightWatch, look=lambda self, arguments: None, ran=lambda self, seconds: None)


def _microseconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        call(x)
    return (time.perf_counter() - begin) / CALLS * 1e6


def compare(
    call: Callable[[Tensor], Tensor], x: Tensor, without: Callable[[], AbstractContextManager[None]]
) -> dict[str, float]:
    """Median µs a call with a guard and without it, and the median of their difference in each round."""
    guarded, bare = [], []
    for turn in range(ROUNDS):
        for unguarded in (turn % 2, 1 - turn % 2):
            if unguarded:
                with without():
                    bare.append(_microseconds(call, x))
            else:
                guarded.append(_microseconds(call, x))
    differences = [one - other for one, other in zip(guarded, bare, strict=True)]
    return {
        "with_us": statistics.median(guarded),
        "without_us": statistics.median(bare),
        "difference_us": statistics.median(differences),
    }


def alone() -> dict[str, float]:
    """Microseconds that entering and leaving a call takes, nothing being done in it."""

    def enter(x: Tensor) -> Tensor:
        with STATES:
            return x

    empty = torch.empty(0)
    found = [_microseconds(enter, empty) - _microseconds(lambda x: x, empty) for _ in range(ROUNDS)]
    return {"threads_us": statistics.median(found)}


def main() -> None:
    """Measures, prints and writes."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads that wait for a busy core would hide what a guard takes
    rows = []
    for m, k, n in SHAPES:
        x = torch.randn(m, k)
        model = nn.Sequential(nn.Linear(k, n)).eval().requires_grad_(False)
        graph = torch.compile(model, backend="mixq", options={"force": True})
        graph(x)
        module = mixq.quantize(nn.Sequential(nn.Linear(k, n)).eval().requires_grad_(False))
        for route, call, guard, without in (
            ("module", module, "threads", without_module_access),
            ("graph", graph, "threads", without_graph_access),
            ("graph", graph, "content of weights", without_watch),
        ):
            with torch.no_grad():
                _microseconds(call, x)
                found = compare(call, x, without)
            if guard == "content of weights":
                watches = [watch for watch in weight_watch._WATCHES if watch.watches(model.parameters())]
                found["share_of_time"] = max(watches, key=lambda watch: watch.calls).share
            rows.append({"rows": m, "k": k, "n": n, "route": route, "guard": guard, **found})
            print(
                f"M={m} K={k} N={n} {route:7} {guard:20} with {found['with_us']:8.1f} µs, "
                f"without {found['without_us']:8.1f}, difference {found['difference_us']:+.2f}"
            )
    by_itself = alone()
    shares = [row["share_of_time"] for row in rows if "share_of_time" in row]
    print(f"alone: {by_itself}; looking took {shares} of the time")
    device = torch.device("cpu")
    environment = asdict(examine(device, measure_floor(device, 20)))
    RESULTS.write_text(
        json.dumps({"environment": environment, "alone": by_itself, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
