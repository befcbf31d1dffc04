"""Options that several benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mixq_compile.benchmarking.choices import MODEL_PEERS, PEERS, parse_names, parse_numbers, parse_schemes
from mixq_compile.benchmarking.shapes import MODELS, find_model, parse_shape
from mixq_compile.cli.options import valid
from mixq_compile.formats import TensorFormat


def _each_shape(texts: Sequence[str]) -> None:
    for text in texts:
        parse_shape(text)


Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="N,K",
        callback=valid(_each_shape),
        help="A linear by out_features and in_features; may be given several times.",
        show_default=False,
    ),
]
Rows = Annotated[
    str | None,
    typer.Option(
        metavar="M,M,…",
        callback=valid(parse_numbers),
        help="Numbers of rows (tokens), with commas between.",
        show_default=False,
    ),
]
Bits = Annotated[
    int,
    typer.Option(callback=valid(lambda bits: TensorFormat(bits)), help="Bits of a weight code: 8 or 4."),
]
Peers = Annotated[
    str,
    typer.Option(
        callback=valid(lambda text: parse_names(text, "peer", PEERS)),
        help=f"Baselines beside 16 bit, with commas between: {', '.join(PEERS)}; or all, none. The last four "
        "compile or tune for each shape and number of rows.",
    ),
]
Replays = Annotated[int, typer.Option(min=2, help="Timed runs of each call.")]
Kernel = Annotated[str, typer.Option(help="Kernel provider; auto takes the best: auto, cpu, ref, tl.")]
Output = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        help="Folder for JSON, Markdown and plots.  [dim]\\[default: Markdown to stdout][/dim]",
        show_default=False,
    ),
]
Commit = Annotated[
    str, typer.Option(help="Commit to record where the tree travels without git.", show_default=False)
]
ModelName = Annotated[
    str,
    typer.Option(callback=valid(find_model), help=f"The configuration: {', '.join(MODELS)}."),
]
Schemes = Annotated[str, typer.Option(callback=valid(parse_schemes), help="Schemes, with commas between.")]
ModelPeers = Annotated[
    str,
    typer.Option(
        callback=valid(lambda text: parse_names(text, "peer", MODEL_PEERS)),
        help=f"Baselines beside 16 bit, with commas between: {', '.join(MODEL_PEERS)}; or all, none.",
    ),
]
Autotune = Annotated[
    bool, typer.Option("--autotune", help="Compile with max-autotune: minutes for each number of rows.")
]
