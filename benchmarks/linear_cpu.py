"""Times the parts of one quantized linear on the CPU beside the float32 linear.

Shapes are those of all-MiniLM-L6-v2 with 64 × 128 tokens, and K = N = 4096 with few rows. Every case runs
once in each turn, so that noise hits all alike; figures are the best turn's. Results are fresh tensors
in every case, as in a model: memory that the process has to ask for is part of the time.
Run it from the repository: `PYTHONPATH=. python benchmarks/linear_cpu.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from record import RESULTS, environment
from torch.nn import functional

from mixq_compile import ops
from mixq_compile.formats import TensorFormat
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.scheme import WeightRecipe

SHAPES = (
    (8192, 384, 384),
    (8192, 384, 1536),
    (8192, 1536, 384),
    (1, 4096, 4096),
    (16, 4096, 4096),
    (128, 4096, 4096),
)
"""Rows, in_features, out_features."""
OUTLIERS = (0, 8, 16)
TURNS = 25
KERNEL = "cpu"


class Layer:
    """One linear, packed, and inputs with planted outlier columns that its state already knows."""

    def __init__(self, rows: int, in_features: int, out_features: int, outliers: int) -> None:
        self.x = torch.randn(rows, in_features).clamp_(-4, 4)
        self.weight = torch.randn(out_features, in_features) * in_features**-0.5
        self.bias = torch.randn(out_features)
        self.codes, self.scale = quantize_weight(self.weight, WeightRecipe(TensorFormat(8)))
        columns = [place * in_features // max(outliers, 1) for place in range(outliers)]
        self.x[:, columns] *= 20
        self.state = OutlierState.create(in_features, 16, 6.0, "cpu")
        self.state.preload(columns)
        self.outlier_weight = torch.zeros(out_features, 16)
        self.outlier_weight[:, :outliers] = self.weight[:, columns]
        self.next_state = OutlierState.create(out_features, 48, 1e3, "cpu")
        self.quantized = self.quantize()

    def quantize(self) -> tuple[torch.Tensor, ...]:
        """The input's codes, scale and outliers, and how many."""
        return ops.quantize_online(self.x, *self.state.buffers(), "int8", "exact", 0, KERNEL)  # type: ignore[no-any-return]

    def multiply(self, quantized: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The linear of a quantized input."""
        return ops.mixed_linear(  # type: ignore[no-any-return]
            self.x, *quantized, self.codes, self.scale, self.outlier_weight, self.bias, 0, KERNEL
        )

    def gelu_and_quantize(self) -> object:
        """The linear, GELU and the next quantization, one after the other."""
        value = functional.gelu(self.multiply(self.quantized))
        return ops.quantize_online(value, *self.next_state.buffers(), "int8", "exact", 0, KERNEL)

    def fused(self) -> object:
        """The same in one operator."""
        codes, *rest = self.quantized
        return ops.quantized_linear(
            codes, *self.next_state.buffers(), *rest, self.codes, self.scale, self.outlier_weight,
            self.bias, "gelu", 8, "exact", KERNEL,
        )  # fmt: skip


def cases(rows: int, in_features: int, out_features: int) -> dict[str, Callable[[], object]]:
    """What is timed at one shape."""
    layers = {count: Layer(rows, in_features, out_features, count) for count in OUTLIERS}
    plain = layers[0]
    eight = layers[8]
    found: dict[str, Callable[[], object]] = {
        "float32 linear": lambda: functional.linear(plain.x, plain.weight, plain.bias),
        "_int_mm alone": lambda: torch._int_mm(plain.quantized[0], plain.codes.t()),
        "quantize": plain.quantize,
        "quantize, 8 outliers": eight.quantize,
    }
    for count, layer in layers.items():
        found[f"mixed linear, {count} outliers"] = lambda layer=layer: layer.multiply(layer.quantized)  # type: ignore[misc]
    found["quantize and mixed linear, 8 outliers"] = lambda: eight.multiply(eight.quantize())
    if out_features > in_features:
        found["mixed linear, GELU, quantize, 8 outliers"] = eight.gelu_and_quantize
        found["the same as quantized_linear"] = eight.fused
    return found


def best_seconds(functions: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The shortest time of each function over turns in which each runs once."""
    best = dict.fromkeys(functions, float("inf"))
    for turn in range(turns + 2):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if turn > 1:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def main() -> None:
    """Times every shape, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shapes: list[dict[str, Any]] = []
    for rows, in_features, out_features in SHAPES:
        products = rows * in_features * out_features
        with torch.no_grad():
            seconds = best_seconds(cases(rows, in_features, out_features), arguments.turns)
        print(f"M={rows} K={in_features} N={out_features}")
        measured = {}
        for name, value in seconds.items():
            ratio = seconds["float32 linear"] / value
            rate = products / value * 1e-9
            print(f"  {name:42} {value * 1e3:8.3f} ms {rate:7.0f} GMAC/s {ratio:6.2f}x")
            measured[name] = {"ms": round(value * 1e3, 4), "over_float32_linear": round(ratio, 3)}
            if "linear" in name or "_int_mm" in name:
                measured[name]["gmac_per_s"] = round(rate, 1)
        shapes.append(
            {"rows": rows, "in_features": in_features, "out_features": out_features, "cases": measured}
        )
    RESULTS.mkdir(exist_ok=True)
    result = {"environment": environment(), "turns": arguments.turns, "shapes": shapes}
    (RESULTS / "linear_cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
