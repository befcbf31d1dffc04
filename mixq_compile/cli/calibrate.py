"""`mixq calibrate`: statistics of what a model's linears see, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixq_compile.cli.options import Device, Dtype, Json, ModelArgument, TextFile
from mixq_compile.cli.output import check_file, console, print_json, print_table

if TYPE_CHECKING:
    from mixq_compile.calibration import CalibrationStats

DEFAULT_LENGTH = 512
LINEARS_SHOWN = 12


def calibrate(
    model: ModelArgument,
    text: TextFile,
    output: Annotated[
        Path, typer.Option(help="File to write, for example stats.safetensors.", show_default=False)
    ],
    limit: Annotated[int, typer.Option(min=1, help="Most windows of text to run.")] = 128,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a window.  [dim]\\[default: 512, or the model's context][/dim]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows run together.")] = 8,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="What to collect beside [bold]channels[/bold]: [bold]gram[/bold], the second moments of "
            "the inputs (memory and file grow with K²), or [bold]sample[/bold], up to 512 rows of each "
            "input. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Run a model over sample text and write what its linears saw to a file.

    The file holds, for each linear, the largest magnitude of each input channel and more. Schemes with
    4-bit activations choose their 16-bit columns from it, and so does every scheme under the policy
    `static`. Text like that of the later use is best; 128 windows are plenty.

    Example: [bold]mixq calibrate MODEL --text train.txt --output stats.safetensors[/bold]
    """
    from mixq_compile.calibration import calibrate as run_calibration
    from mixq_compile.calibration.collected import checked_kinds
    from mixq_compile.cli.models import load_model, require_unquantized
    from mixq_compile.cli.texts import batches, read_text, windows
    from mixq_compile.evaluation.scoring import context_length

    check_file("--output", output)
    require_unquantized(model)
    kinds, sample = checked_kinds(kind or ("channels",)), read_text(text)
    loaded = load_model(model, device, dtype)
    longest = length or min(DEFAULT_LENGTH, context_length(loaded.model) or DEFAULT_LENGTH)
    ids = windows(loaded.required_tokenizer(), sample, longest, limit)
    stats = run_calibration(loaded.model, batches(ids, batch), kinds=kinds)
    stats.save(output)
    if json:
        print_json(summary(stats, output, len(ids)))
    else:
        _print(stats, output, len(ids))


def summary(stats: CalibrationStats, path: Path, windows_run: int) -> dict[str, Any]:
    """The statistics in short, as JSON-able data."""
    return {
        "file": str(path),
        "sha256": stats.sha256(),
        "windows": windows_run,
        "tokens": stats.total_rows,
        "threshold": stats.thresholds[0],
        "kinds": list(stats.kinds),
        "linears": {
            fqn: {
                "in_features": stats[fqn].in_features,
                "largest": float(stats[fqn].absmax.max()),
                "median": float(stats[fqn].absmax.median()),
                "columns_above": len(stats.outlier_columns(fqn)),
            }
            for fqn in stats
        },
        "never_run": list(stats.never_run),
    }


def _print(stats: CalibrationStats, path: Path, windows_run: int) -> None:
    facts = summary(stats, path, windows_run)
    threshold = facts["threshold"]
    ordered = sorted(facts["linears"].items(), key=lambda entry: -entry[1]["largest"])
    rows = [
        (
            fqn, str(entry["in_features"]), f"{entry['largest']:.1f}", f"{entry['median']:.1f}",
            str(entry["columns_above"]),
        )
        for fqn, entry in ordered[:LINEARS_SHOWN]
    ]  # fmt: skip
    columns = ("linear", "K", "largest", "median channel", f"channels above {threshold:g}")
    target = console()
    print_table(target, "Largest magnitudes of the linears' inputs", columns, rows)
    if len(ordered) > LINEARS_SHOWN:
        target.print(f"… and {len(ordered) - LINEARS_SHOWN} more linears with smaller inputs", style="dim")
    target.print(
        f"{windows_run} windows, {stats.total_rows} tokens, {len(stats)} linears; "
        f"{' and '.join(stats.kinds)} written to {path} (sha256 {facts['sha256'][:12]}…)",
        markup=False,
    )
