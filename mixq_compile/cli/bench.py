"""`mixq bench`: benchmarks, each with its baselines in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from mixq_compile.benchmarking.choices import DEFAULT_PEERS, PARTS, PEERS, parse_names, parse_numbers
from mixq_compile.benchmarking.shapes import (
    KERNEL_ROWS,
    KERNEL_SHAPES,
    LAYOUT_ROWS,
    LAYOUT_SHAPES,
    parse_shape,
)
from mixq_compile.cli.benchmark_options import Bits, Commit, Kernel, Output, Peers, Replays, Rows, Shapes
from mixq_compile.cli.options import Device, Json, valid

PEERS_BY_DEFAULT = ",".join(DEFAULT_PEERS)
SUMMARY = """Measure kernels, layers and whole models beside their baselines, in one run each.

On a GPU every call is a CUDA graph replayed with the L2 cache flushed, calls take turns, and a time is a
median of device events with its tenth and ninetieth percentiles. On a CPU only ratios mean anything.
Results go to stdout as Markdown or JSON, or with --output to a folder as both, and as plots.

Begin with: [bold]mixq bench kernels --shape 11008,4096 --rows 16,1024[/bold]
"""


def kernels(
    shape: Shapes = None,
    rows: Rows = None,
    bits: Bits = 8,
    only: Annotated[
        str,
        typer.Option(
            callback=valid(lambda text: parse_names(text, "part", PARTS)),
            help=f"Parts to measure, with commas between: {', '.join(PARTS)}.",
        ),
    ] = "all",
    peers: Peers = PEERS_BY_DEFAULT,
    replays: Replays = 21,
    device: Device = "auto",
    kernel: Kernel = "auto",
    output: Output = None,
    commit: Commit = "",
    json: Json = False,
) -> None:
    """Measure one quantized linear: the product alone, the whole operator, the quantization, errors.

    The product (gemm) has its operands quantized before and 128 outlier columns in 16 bit; the whole adds
    quantization, the check for new outlier columns and the outlier weights. Errors are against float64,
    beside those of the scheme's float64 simulation. Without options: eight linears of Llama-2-7B and 70B
    at 13 numbers of rows.

    Example: [bold]mixq bench kernels --shape 11008,4096 --rows 16,1024,4096 --output results[/bold]
    """
    from mixq_compile.benchmarking import kernels as benchmark
    from mixq_compile.benchmarking.linear_bench import KernelOptions
    from mixq_compile.cli.benchmark_running import run

    options = KernelOptions(
        shapes=tuple(parse_shape(text) for text in shape) if shape else KERNEL_SHAPES,
        rows=parse_numbers(rows) if rows else KERNEL_ROWS,
        bits=bits,
        parts=parse_names(only, "part", PARTS),
        peers=parse_names(peers, "peer", PEERS),
        replays=replays,
        kernel=kernel,
    )
    run(benchmark.run, options, device=device, output=output, commit=commit, json=json)


def breakdown(
    shape: Shapes = None,
    rows: Rows = None,
    replays: Replays = 21,
    device: Device = "auto",
    kernel: Kernel = "auto",
    output: Output = None,
    commit: Commit = "",
    json: Json = False,
) -> None:
    """Measure what each fusion brings, and what learning new outlier columns costs.

    Stages of one linear: outliers detected first while the host waits; quantized ahead of detection by
    separate kernels; quantization in one kernel; product and dequantization in one kernel. Then the
    policies, and calls of which 0, 1, 5, 20 and 100 % meet a new outlier column.

    Example: [bold]mixq bench breakdown --shape 11008,4096 --rows 1024,4096[/bold]
    """
    from mixq_compile.benchmarking import breakdown as benchmark
    from mixq_compile.cli.benchmark_running import run

    options = benchmark.BreakdownOptions(
        shapes=tuple(parse_shape(text) for text in shape) if shape else LAYOUT_SHAPES,
        rows=parse_numbers(rows) if rows else LAYOUT_ROWS,
        replays=replays,
        kernel=kernel,
    )
    run(benchmark.run, options, device=device, output=output, commit=commit, json=json)


def structure(
    shape: Shapes = None,
    rows: Rows = None,
    replays: Replays = 21,
    device: Device = "auto",
    kernel: Kernel = "auto",
    output: Output = None,
    commit: Commit = "",
    json: Json = False,
) -> None:
    """Measure two layouts: outlier columns kept in their places (ours), or moved out of the matrices.

    Both run the same kernels. The permuted one gathers the activation's columns first and has a narrower
    integer product; then what a new outlier column costs each.

    Example: [bold]mixq bench structure --shape 4096,11008 --rows 1024[/bold]
    """
    from mixq_compile.benchmarking import structure as benchmark
    from mixq_compile.cli.benchmark_running import run

    options = benchmark.StructureOptions(
        shapes=tuple(parse_shape(text) for text in shape) if shape else LAYOUT_SHAPES,
        rows=parse_numbers(rows) if rows else LAYOUT_ROWS,
        replays=replays,
        kernel=kernel,
    )
    run(benchmark.run, options, device=device, output=output, commit=commit, json=json)


BENCHMARKS: dict[str, Callable[..., None]] = {
    "kernels": kernels,
    "breakdown": breakdown,
    "structure": structure,
}
"""Every benchmark under its name."""
