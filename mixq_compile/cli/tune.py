"""`mixq tune`: measures on this machine's GPU what quantized linears gain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixq_compile.benchmarking.choices import parse_numbers
from mixq_compile.benchmarking.shapes import KERNEL_ROWS, LinearShape, parse_shape
from mixq_compile.cli.benchmark_options import Bits, Rows, Shapes
from mixq_compile.cli.options import Device, Json
from mixq_compile.cli.output import console, print_json, print_table
from mixq_compile.errors import MixqError, OptionError

if TYPE_CHECKING:
    import torch

    from mixq_compile.kernels.tl.speed_table import SpeedTable


def tune(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Hugging Face directory or hub name, or module:function; only its shapes are read.",
            show_default=False,
        ),
    ] = None,
    shape: Shapes = None,
    rows: Rows = None,
    bits: Bits = 8,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure what quantized linears gain on this GPU, so that compiling need not.

    A linear is left in 16 bit where it would be slower. What is faster was measured on some GPUs and is
    part of this package; on any other it is measured when a shape is first compiled, and kept on disk.
    This measures ahead, for a model's linears and their sums where siblings become one product, and
    replaces shipped figures by this machine's own. On a CPU there is nothing to do ahead.

    Example: [bold]mixq tune MODEL --rows 1,16,256,2048[/bold]
    """
    import torch

    from mixq_compile.cli.models import resolve_device
    from mixq_compile.kernels.tl import measured, speed_table

    if model is None and not shape:
        raise OptionError("nothing to measure: give MODEL, or --shape N,K (for example --shape 11008,4096).")
    target = resolve_device(device)
    if target.type != "cuda":
        raise MixqError(
            "mixq tune measures GPUs, and finds none here. On a CPU each shape is measured when a model is "
            "compiled; `mixq doctor` tells what this machine has."
        )
    shapes = [parse_shape(text) for text in shape or []]
    if model is not None:
        shapes += shapes_of(model)
    counts = sorted(set(parse_numbers(rows) if rows else KERNEL_ROWS))
    name = measured.device_name(torch.device(target.type, target.index or 0))
    table = speed_table.tuned(name)
    _measure(table, list(dict.fromkeys(shapes)), counts, bits, target)
    path = speed_table.save(table)
    wanted = {(bits, one.out_features, one.in_features) for one in shapes}
    found = {key: gains for key, gains in table.entries.items() if key in wanted}
    if json:
        chosen = speed_table.SpeedTable(name, found)
        print_json({**chosen.to_json(), "file": str(path)})
        return
    cells = [
        [f"{features}×{columns}", *(f"{gains[count]:.2f}" for count in counts)]
        for (_, features, columns), gains in sorted(found.items())
    ]
    title = f"{name}: speed over 16 bit, {bits}-bit weights, by rows (N×K in the first column)"
    print_table(console(), title, ["linear", *map(str, counts)], cells)
    console().print(f"kept in {path}", style="dim", markup=False)


def _measure(
    table: SpeedTable, shapes: list[LinearShape], counts: list[int], bits: int, device: torch.device
) -> None:
    """Measures every shape at every number of rows, with a bar on stderr."""
    import torch
    from rich.progress import Progress

    from mixq_compile.formats import INT8, TensorFormat
    from mixq_compile.kernels.tl.tuning import measure_into
    from mixq_compile.ops.providers import KernelQuery, load_providers

    load_providers()
    with Progress(console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(shapes) * len(counts))
        for one in shapes:
            for count in counts:
                progress.update(task, description=f"{one} at {count} rows")
                query = KernelQuery(
                    "mixed_linear",
                    device,
                    torch.bfloat16,
                    TensorFormat(bits),
                    INT8,
                    one.in_features,
                    one.out_features,
                )
                measure_into(table, query, count)
                progress.advance(task)


def shapes_of(source: str) -> list[LinearShape]:
    """The shapes of a model's linears, and of neighbours that read one value put together."""
    network = _without_weights(source)
    shapes: dict[LinearShape, None] = {}
    for module in network.modules():
        together: dict[int, int] = {}
        for child in module.children():
            columns, features = _linear_size(child)
            if not features:
                continue
            together[columns] = together.get(columns, 0) + features
            shapes[LinearShape(features, columns)] = None
            shapes[LinearShape(together[columns], columns)] = None
    if not shapes:
        raise MixqError(f"{source} has no linears: there is nothing to measure.")
    return list(shapes)


def _linear_size(module: torch.nn.Module) -> tuple[int, int]:
    """K and N of a linear; zeros for anything else."""
    from mixq_compile.ir.linears import is_conv1d, is_plain_linear

    if is_plain_linear(module):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if is_conv1d(module):
        columns, features = module.weight.shape  # type: ignore[misc, union-attr]
        return int(columns), int(features)
    return 0, 0


def _without_weights(source: str) -> Any:
    """The model's modules; of a Hugging Face model no weight is loaded."""
    import torch

    from mixq_compile.cli.models import BUILDER, load_model

    if BUILDER.fullmatch(source):
        return load_model(source, "cpu").model
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise MixqError(
            "reading a model's shapes needs transformers: pip install 'mixq-compile[demo]', or give the "
            "shapes with --shape N,K."
        ) from error
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise OptionError(
            f"{source} is no Hugging Face model that could be read ({reason}). Give a directory with "
            "config.json, a hub name, module:function, or the shapes with --shape N,K."
        ) from error
    with torch.device("meta"):
        return AutoModel.from_config(config)
