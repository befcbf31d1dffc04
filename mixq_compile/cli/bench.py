"""`mixq bench`: benchmarks, each with its baselines in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from mixq_compile.benchmarking.choices import (
    DEFAULT_PEERS,
    FP8_DYNAMIC,
    HOST_WAYS,
    KINDS,
    MODEL_PEERS,
    PARTS,
    PEERS,
    parse_batch,
    parse_batches,
    parse_names,
    parse_numbers,
    parse_schemes,
)
from mixq_compile.benchmarking.shapes import (
    KERNEL_ROWS,
    KERNEL_SHAPES,
    LAYER_ROWS,
    LAYOUT_ROWS,
    LAYOUT_SHAPES,
    MODELS,
    parse_shape,
)
from mixq_compile.cli.benchmark_options import (
    Autotune,
    Bits,
    Commit,
    Kernel,
    ModelName,
    ModelPeers,
    Output,
    Peers,
    Replays,
    Rows,
    Schemes,
    Shapes,
)
from mixq_compile.cli.options import Device, Dtype, Json, Lowering, valid

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


def layers(
    model: ModelName = "llama-2-7b",
    rows: Rows = None,
    schemes: Schemes = "w8a8o16",
    peers: Peers = FP8_DYNAMIC,
    autotune: Autotune = False,
    replays: Replays = 21,
    device: Device = "auto",
    kernel: Kernel = "auto",
    output: Output = None,
    commit: Commit = "",
    json: Json = False,
    lowering: Lowering = "inductor",
) -> None:
    """Measure one decoder layer: each of its linears alone, and the whole layer compiled.

    The layer has random weights and planted outlier channels. 16 bit is compiled by Inductor, the schemes
    by the mixq backend, and both are replayed as CUDA graphs on a GPU; eager times stand beside them.

    Example: [bold]mixq bench layers --model llama-3-8b --rows 1,1024,4096[/bold]
    """
    from mixq_compile.benchmarking import layers as benchmark
    from mixq_compile.cli.benchmark_running import run

    options = benchmark.LayerOptions(
        model=model,
        rows=parse_numbers(rows) if rows else LAYER_ROWS,
        schemes=parse_schemes(schemes),
        peers=parse_names(peers, "peer", PEERS),
        autotune=autotune,
        replays=replays,
        kernel=kernel,
        lowering=lowering,
    )
    run(benchmark.run, options, device=device, output=output, commit=commit, json=json)


def model(
    model: ModelName = "llama-2-7b",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model that are built.")] = 8,
    only: Annotated[
        str,
        typer.Option(
            callback=valid(lambda text: parse_names(text, "workload", KINDS)),
            help=f"Workloads, with commas between: {', '.join(KINDS)}.",
        ),
    ] = "all",
    batches: Annotated[
        str, typer.Option(callback=valid(parse_numbers), help="Batches of decoding, with commas between.")
    ] = "1,32,256",
    contexts: Annotated[
        str, typer.Option(callback=valid(parse_numbers), help="Tokens in the cache while decoding.")
    ] = "128,1024,4096",
    prefill: Annotated[
        str, typer.Option(callback=valid(parse_batch), help="Sequences x tokens of the prefill.")
    ] = "8x2048",
    single: Annotated[
        str, typer.Option(callback=valid(parse_numbers), help="Batches of one token without a cache.")
    ] = "32,128,512",
    schemes: Schemes = "w8a8o16",
    peers: ModelPeers = "none",
    autotune: Autotune = False,
    eager: Annotated[bool, typer.Option(help="Time the uncompiled models too.")] = True,
    replays: Replays = 15,
    device: Device = "auto",
    output: Output = None,
    commit: Commit = "",
    json: Json = False,
    lowering: Lowering = "inductor",
) -> None:
    """Measure a model by configuration: prefill, decode with a cache, one token without a cache; memory.

    Weights are random, with planted outlier channels; a few layers are enough, since all are alike. 16 bit
    is compiled by Inductor, the schemes are swapped in (their 16-bit weights are freed) and compiled by the
    mixq backend. 4-bit schemes are calibrated on random tokens. Every workload compiles each variant anew,
    and tells how long the first call took.

    Example: [bold]mixq bench model --only decode --contexts 1024 --schemes w8a8o16,w4a8o16[/bold]
    """
    from mixq_compile.benchmarking import models as benchmark
    from mixq_compile.cli.benchmark_running import run

    options = benchmark.ModelOptions(
        model=model,
        layers=layers,
        kinds=parse_names(only, "workload", KINDS),
        batches=parse_numbers(batches),
        contexts=parse_numbers(contexts),
        prefill=parse_batch(prefill),
        single_batches=parse_numbers(single),
        schemes=parse_schemes(schemes),
        peers=parse_names(peers, "peer", MODEL_PEERS),
        autotune=autotune,
        eager=eager,
        replays=replays,
        lowering=lowering,
    )
    run(benchmark.run, options, device=device, output=output, commit=commit, json=json)


def host(
    model: ModelName = "llama-3-8b",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model that are built.")] = 4,
    batches: Annotated[
        str,
        typer.Option(
            callback=valid(parse_batches), help="Sequences x tokens of each, with commas between the batches."
        ),
    ] = "4x1024,8x128,1x16",
    only: Annotated[
        str,
        typer.Option(
            callback=valid(lambda text: parse_names(text, "way", HOST_WAYS)),
            help=f"Ways to run the layers, with commas between: {', '.join(HOST_WAYS)}.",
        ),
    ] = "all",
    replays: Replays = 41,
    device: Device = "auto",
    output: Output = None,
    commit: Commit = "",
    json: Json = False,
    lowering: Lowering = "inductor",
) -> None:
    """Measure what a call costs the host: each operator, and layers compiled, in CUDA graphs and eager.

    As a user calls them: 16 bit by torch.compile, the same model with backend="mixq", and swapped linears
    beside eager ones, turn by turn. Where the device waits for the host, fast kernels make a slow product.

    Example: [bold]mixq bench host --batches 8x128 --only compiled,eager[/bold]
    """
    from mixq_compile.benchmarking import host_time as benchmark
    from mixq_compile.cli.benchmark_running import run

    chosen = parse_names(only, "way", HOST_WAYS)
    options = benchmark.HostOptions(
        model=model,
        layers=layers,
        batches=parse_batches(batches),
        ways=tuple(way for name, way in zip(HOST_WAYS, benchmark.WAYS, strict=True) if name in chosen),
        replays=replays,
        lowering=lowering,
    )
    run(benchmark.run, options, device=device, output=output, commit=commit, json=json)


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|DIR",
            help=f"A configuration, with random weights ({', '.join(MODELS)}), or a Hugging Face directory.",
        ),
    ] = "llama-2-7b",
    batches: Annotated[
        str, typer.Option(callback=valid(parse_numbers), help="Batch sizes, with commas between.")
    ] = "1,8,32",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new: Annotated[int, typer.Option(min=2, help="Tokens that are generated: the Decode Length.")] = 128,
    schemes: Schemes = "w8a8o16",
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers that are built of a configuration.", show_default="all"),
    ] = None,
    unprepared: Annotated[
        bool, typer.Option("--unprepared", help="Measure generate() as transformers runs it, too.")
    ] = False,
    replays: Replays = 5,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what --output has of the same options and device.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Output = None,
    commit: Commit = "",
    json: Json = False,
    lowering: Lowering = "inductor",
) -> None:
    """Measure generate() as a user calls it: decode tokens/s, memory, time to first token.

    The model in 16 bit and in each scheme, all under mixq.prepare_for_generation: prompts and decoding
    compiled, on a GPU in CUDA graphs. What transformers itself takes for a step is measured with a model
    whose forward is empty. With --output every case is written when it is measured, and --resume goes on
    after an interruption.

    Example: [bold]mixq bench generate llama-2-7b --batches 1,8,32 --schemes w8a8o16,w4a8o16
    --output results[/bold]
    """
    from functools import partial

    from mixq_compile.benchmarking import generating as benchmark
    from mixq_compile.benchmarking.generating_results import GenerateOptions
    from mixq_compile.cli.benchmark_running import run
    from mixq_compile.cli.generating import loader
    from mixq_compile.cli.models import resolve_device, resolve_dtype

    target = resolve_device(device)
    kind = resolve_dtype(dtype, target)
    options = GenerateOptions(
        model=model,
        dtype=str(kind).removeprefix("torch."),
        layers=layers,
        batches=parse_numbers(batches),
        prompt=prompt,
        new=new,
        schemes=parse_schemes(schemes),
        unprepared=unprepared,
        replays=replays,
        lowering=lowering,
    )
    measure = partial(benchmark.run, load=loader(options, target, kind), folder=output, resume=resume)
    run(measure, options, device=device, output=output, commit=commit, json=json)


BENCHMARKS: dict[str, Callable[..., None]] = {
    "kernels": kernels,
    "layers": layers,
    "model": model,
    "breakdown": breakdown,
    "structure": structure,
    "host": host,
    "generate": generate,
}
"""Every benchmark under its name."""
