"""Checks and times one quantized linear against the 16-bit one.

Both sides run in a CUDA graph of their own, everything included (for the quantized linear:
`quantize_online` with policy `exact`, `refresh_outlier_weights`, `mixed_linear`), with the L2 cache
flushed before every replay; medians of device events. Errors are relative to float64. The `scheme`
error is that of a float64 simulation of the scheme on the same data, rounded once as the scheme says:
the floor that a kernel can reach. Run it from the repository: `PYTHONPATH=. python benchmarks/linear_gpu.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional

from mixq_compile.ops import declarations as ops
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.providers import KernelQuery, small_batch_limit
from mixq_compile.ops.weight_codes import dequantize_weight, quantize_weight
from mixq_compile.scheme import TensorFormat

SHAPES = {
    "7B up": (11008, 4096),
    "7B down": (4096, 11008),
    "70B up": (28672, 8192),
    "7B attention": (4096, 4096),
    "1B": (2048, 2048),
    "small": (768, 768),
}
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)
CAPACITY = 128
OUTLIERS = 32
OUTLIER_SIZE = 20.0
REPLAYS = 31
L2_FLUSH_BYTES = 256 << 20
ERROR_ROWS = 1024
"""Errors are taken over at most so many rows: they do not depend on how many there are."""
RESULTS = Path(__file__).parent / "results"


def time_us(function: Callable[[], object], flush: Tensor) -> float:
    """Median time of one replay of a captured call, in microseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    events = []
    for _ in range(REPLAYS + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1000 for start, end in events[3:])


class Layer:
    """One linear of nn.Linear's initial weights, packed, with its outlier state."""

    def __init__(self, out_features: int, in_features: int, bits: int) -> None:
        bound = in_features**-0.5
        self.weight = torch.empty(out_features, in_features, device="cuda").uniform_(-bound, bound).bfloat16()
        self.codes, self.scale = quantize_weight(self.weight, TensorFormat(bits, "channel"))
        self.state = OutlierState.create(in_features, CAPACITY, 6.0, "cuda")
        self.cached_index = torch.full((CAPACITY,), -1, dtype=torch.int32, device="cuda")
        self.outlier_weight = torch.zeros(out_features, CAPACITY, dtype=torch.bfloat16, device="cuda")
        query = KernelQuery(
            "mixed_linear", self.weight.device, torch.bfloat16, bits, in_features, out_features
        )
        self.small_m = small_batch_limit(query)

    def forget(self) -> None:
        """Back to a state without outlier columns."""
        self.state.reset()
        self.cached_index.fill_(-1)
        self.outlier_weight.zero_()

    def __call__(self, x: Tensor, originals: bool) -> Tensor:
        """The quantized linear, its outlier weight from the 16-bit originals or from the codes."""
        kept = self.weight if originals else self.weight.new_empty(0)
        codes, scale, outliers, count = ops.quantize_online(
            x, *self.state.buffers(), 8, "exact", self.small_m, "auto"
        )
        ops.refresh_outlier_weights(
            codes, self.state.index, count, [self.cached_index], [self.outlier_weight], [self.codes],
            [self.scale], [kept], self.small_m, "auto",
        )  # fmt: skip
        return ops.mixed_linear(
            x, codes, scale, outliers, count, self.codes, self.scale, self.outlier_weight, None,
            self.small_m, "auto",
        )  # fmt: skip

    def simulate(self, x: Tensor, originals: bool) -> Tensor:
        """The scheme in float64: exact sums of what the scheme rounds, and one rounding at the end."""
        weight = dequantize_weight(self.codes, self.scale, x.shape[1]).double()
        if x.shape[0] <= self.small_m:
            return (x.double() @ weight.T).bfloat16().double()
        columns = (x.abs().amax(dim=0) > 6.0).nonzero().flatten()
        inner = x.double().index_fill(1, columns, 0.0)
        scale = inner.abs().amax(dim=1, keepdim=True) / 127
        result = (inner / scale).round() * scale @ weight.T
        kept = self.weight.double() if originals else weight.bfloat16().double()
        return (result + x[:, columns].double() @ kept[:, columns].T).bfloat16().double()


def error(found: Tensor, reference: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found.double() - reference).norm() / reference.norm())


def activation(rows: int, in_features: int) -> Tensor:
    """Normal values, some columns of which are larger."""
    x = torch.randn(rows, in_features, device="cuda")
    x[:, :: in_features // OUTLIERS][:, :OUTLIERS] *= OUTLIER_SIZE
    return x.bfloat16()


def measure(name: str, bits: int, flush: Tensor) -> list[dict[str, object]]:
    """One row of results for each M."""
    out_features, in_features = SHAPES[name]
    layer = Layer(out_features, in_features, bits)
    found = []
    for rows in ROWS:
        x = activation(rows, in_features)
        few = x[:ERROR_ROWS]
        reference = few.double() @ layer.weight.double().T
        result: dict[str, object] = {"shape": name, "N": out_features, "K": in_features, "M": rows}
        result["path"] = "weight-only" if rows <= layer.small_m else "mixed"
        result["bf16_error"] = error(functional.linear(few, layer.weight), reference)
        for source, originals in (("codes", False), ("originals", True)):
            layer.forget()
            result[f"{source}_error"] = error(layer(few, originals), reference)
            result[f"{source}_scheme_error"] = error(layer.simulate(few, originals), reference)
        layer.forget()
        layer(x, False)
        result["outlier_columns"] = int(layer.state.counters[0])
        del reference
        result["bf16_us"] = time_us(lambda x=x: functional.linear(x, layer.weight), flush)
        result["mixq_us"] = time_us(lambda x=x: layer(x, False), flush)
        result["speedup"] = result["bf16_us"] / result["mixq_us"]
        found.append(result)
    return found


def table(results: list[dict[str, object]]) -> str:
    """The results as Markdown."""
    lines = [
        "| shape | M | path | bf16 µs | mixq µs | speedup | error bf16 | mixq, codes (scheme) "
        "| mixq, originals (scheme) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        lines.append(
            "| {shape} | {M} | {path} | {bf16_us:.1f} | {mixq_us:.1f} | {speedup:.2f} | {bf16_error:.4f} "
            "| {codes_error:.4f} ({codes_scheme_error:.4f}) "
            "| {originals_error:.4f} ({originals_scheme_error:.4f}) |".format(**row)
        )
    return "\n".join(lines)


def main() -> None:
    """Measures all shapes, writes JSON and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=8, help="bits of a weight code")
    parser.add_argument("--output", type=Path, help="where to write the JSON; default: benchmarks/results")
    parser.add_argument("--commit", default="", help="where the tree travels without its git folder")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    results = [row for name in SHAPES for row in measure(name, arguments.bits, flush)]
    commit = arguments.commit
    if not commit:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = asked.stdout.strip()
    document = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "weight_bits": arguments.bits,
        "outliers": {"columns": OUTLIERS, "size": OUTLIER_SIZE, "capacity": CAPACITY},
        "results": results,
    }
    names = {8: "linear_h200.json", 4: "linear_h200_int4.json"}
    output = arguments.output or RESULTS / names[arguments.bits]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
