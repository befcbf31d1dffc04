"""`mixq quantize`: a quantized checkpoint from a 16- or 32-bit model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixq_compile.cli.options import (
    Capacity,
    Device,
    Dtype,
    Json,
    Miss,
    ModelArgument,
    Scheme,
    StatsFile,
    Threshold,
)
from mixq_compile.cli.output import console, mebibytes, print_json, print_table
from mixq_compile.errors import MixqError, OptionError
from mixq_compile.schemes.registry import get_scheme

if TYPE_CHECKING:
    from mixq_compile.runtime.report_tables import Report


def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="Directory to write.", show_default=False)],
    scheme: Scheme = "w8a8o16",
    stats: StatsFile = None,
    threshold: Threshold = None,
    capacity: Capacity = None,
    miss: Miss = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Name, part of a name or glob pattern of linears to leave alone; repeatable."),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer", metavar="PATTERN=SCHEME", help="Another scheme for the linears that match; repeatable."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a directory with files in it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be quantized, its size and time; write nothing.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the hashes of files that are written already.")
    ] = False,
    shard_size: Annotated[
        float, typer.Option(min=0.001, metavar="GB", help="Most bytes of one file of the result.")
    ] = 2.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Replace a model's linears by quantized ones and write the result to a directory.

    The directory holds the codes instead of the weights, and the tokenizer. After import mixq_compile,
    transformers' from_pretrained(DIR) loads it; `mixq eval` and `mixq generate` take it too. Columns that
    stay in 16 bit are found while running, and those of --stats are there from the start. Schemes with
    4-bit weights need --stats, and keep to its columns (--miss static).

    A directory with safetensors files is quantized from file to file, in its own dtype: memory does not
    follow the model's size, and the same command goes on where one was stopped. Other models, and those
    with --dtype, are loaded first.

    Example: [bold]mixq quantize MODEL --output quantized --scheme w8a8o16[/bold]
    """
    from mixq_compile.cli.models import is_quantized, load_model
    from mixq_compile.runtime.checkpoint_saving import save_pretrained
    from mixq_compile.runtime.quantize import quantize as swap
    from mixq_compile.runtime.report import report as report_on

    folder = Path(model).expanduser()
    by_file = dtype == "auto" and _has_safetensors(folder)
    if not by_file and (dry_run or verify):
        raise OptionError(
            "--dry-run and --verify are for a directory with safetensors files, quantized in its own dtype: "
            f"{model} is loaded first."
        )
    _check_output(model, output, overwrite, by_file and (dry_run or verify or _goes_on(output)))
    if is_quantized(folder):
        raise OptionError(f"{model} is quantized already: give the directory of the original model.")
    layers = _layers(layer or [])
    if any(_needs_statistics(name) for name in (scheme, *layers.values())):
        if stats is None:
            raise OptionError(
                f"a checkpoint keeps no 16-bit weights, so the columns that {scheme} leaves in 16 bit must "
                f"be known before: run mixq calibrate {model} --text FILE --output stats.safetensors, and "
                "give --stats stats.safetensors."
            )
        miss = miss or "static"
    options: dict[str, Any] = {
        "stats": stats,
        "threshold": threshold,
        "capacity": capacity,
        "miss": miss,
        "layers": layers,
        "ignore": tuple(ignore) if ignore else ("lm_head",),
    }
    if by_file:
        from mixq_compile.cli.directory_quantization import ByFile, quantize_by_file

        run = ByFile(overwrite, dry_run, verify, int(shard_size * 1e9), json)
        quantize_by_file(folder, output, {"scheme": scheme, **options}, device, run)
        return
    loaded = load_model(model, device, dtype)
    before = model_bytes(loaded.model)
    swap(loaded.model, scheme, **options)
    report = report_on(loaded.model)
    if not report.quantized:
        raise MixqError(f"none of the linears of {model} can be quantized, so nothing was written.")
    save_pretrained(loaded.model, output, max_shard_size=int(shard_size * 1e9))
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(output)
    after = model_bytes(loaded.model)
    if json:
        facts = {"directory": str(output), "bytes_before": before, "bytes_after": after}
        print_json({**facts, "tokenizer": loaded.tokenizer is not None, **report.to_json()})
    else:
        _print(report, before, after, output, has_tokenizer=loaded.tokenizer is not None)


def _has_safetensors(folder: Path) -> bool:
    names = ("model.safetensors", "model.safetensors.index.json")
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in names)


def _goes_on(output: Path) -> bool:
    """True for a directory that an earlier run did not finish."""
    from mixq_compile.runtime.directory_quantization import is_unfinished

    return output.is_dir() and is_unfinished(output)


def _check_output(model: str, output: Path, overwrite: bool, may_have_files: bool) -> None:
    if output.exists() and not output.is_dir():
        raise OptionError(f"--output {output} is a file: give a directory.")
    if output.is_dir() and Path(model).is_dir() and output.samefile(model):
        raise OptionError(f"--output {output} is the model's own directory, whose weights it would replace.")
    if output.is_dir() and any(output.iterdir()) and not (overwrite or may_have_files):
        raise OptionError(f"--output {output} has files in it: give another directory, or --overwrite.")


def _layers(pairs: list[str]) -> dict[str, str]:
    """Pattern to scheme, from `PATTERN=SCHEME` texts."""
    split = [pair.rpartition("=") for pair in pairs]
    for pattern, sign, _ in split:
        if not sign or not pattern:
            raise OptionError("--layer takes PATTERN=SCHEME, for example --layer down_proj=w8a8o16.")
    return {pattern: scheme for pattern, _, scheme in split}


def _needs_statistics(scheme: str) -> bool:
    """True where columns found later could only be rebuilt from 4-bit codes, which are too coarse."""
    chosen = get_scheme(scheme)
    return chosen.weight.bits == 4 and chosen.outliers is not None


def model_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers; those with several names count once."""
    kept = {tensor.untyped_storage().data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _print(report: Report, before: int, after: int, output: Path, *, has_tokenizer: bool) -> None:
    rows = [
        (
            linear.fqn,
            linear.scheme or f"left alone: {linear.skip}",
            f"{linear.out_features} x {linear.in_features}",
            f"{len(linear.outlier_columns)}/{linear.capacity}" if linear.scheme else "",
            mebibytes(linear.bytes_before),
            mebibytes(linear.bytes_after),
        )
        for linear in report.linears
    ]
    target = console()
    columns = ("linear", "scheme", "N x K", "outliers", "MiB before", "after")
    print_table(
        target, f"{len(report.quantized)} of {len(report.linears)} linears quantized", columns, rows, left=2
    )
    target.print(f"model in memory: {mebibytes(before)} MiB before, {mebibytes(after)} MiB after")
    target.print(
        f"written to {output}" + ("" if has_tokenizer else " (the model has no tokenizer)"), markup=False
    )
    target.print(
        f'load it: import mixq_compile; AutoModel….from_pretrained("{output}")   measure '
        f"it: mixq eval {output} --text FILE",
        markup=False,
    )
