"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mixq_compile.errors import OptionError, unknown_name
from mixq_compile.scheme import MISS_POLICIES, OutlierPolicy
from mixq_compile.schemes.registry import accepted_names, get_scheme
from mixq_compile.thresholds import read_threshold

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOWERINGS = ("inductor", "aot_eager", "eager")
NOT_INSTALLED = "is not installed. Install what this command needs with: pip install 'mixq-compile[demo]'"


def valid(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A callback that turns the OptionError of a check into a usage error; it runs before torch is loaded."""

    def callback(value: Any) -> Any:
        try:
            if value is not None:
                check(value)
        except OptionError as error:
            raise typer.BadParameter(str(error)) from error
        return value

    return callback


def one_of(kind: str, names: Sequence[str]) -> Callable[[Any], Any]:
    """A callback that accepts one of these names; the error lists them and the nearest."""

    def check(name: str) -> None:
        if name not in names:
            raise unknown_name(kind, name, names)

    return valid(check)


def _threshold(text: str) -> float | str:
    try:
        return read_threshold(text)
    except OptionError as error:
        raise typer.BadParameter(str(error)) from error


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hugging Face directory or hub name, directory that [bold]mixq quantize[/bold] wrote, or "
        "module:function.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, and nothing else there.")]
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str,
    typer.Option(
        callback=one_of("dtype", DTYPES),
        help=f"{', '.join(DTYPES)}; auto is float32 on the CPU and bfloat16 on a GPU.",
    ),
]
Scheme = Annotated[
    str,
    typer.Option(callback=valid(get_scheme), help=f"One of {', '.join(accepted_names())}."),
]
Threshold = Annotated[
    Any,
    typer.Option(
        parser=_threshold,
        metavar="NUMBER|MULTIPLEx",
        help="Columns with a larger magnitude stay in 16 bit: a number, inf for none, or a multiple of the "
        "row's mean magnitude such as 8x.  [dim]\\[default: the scheme's, 8x][/dim]",
    ),
]
Capacity = Annotated[
    int | None,
    typer.Option(
        callback=valid(lambda value: OutlierPolicy(capacity=value)),
        help="Most outlier columns of one linear, a multiple of 16.  [dim]\\[default: K/16, 16 to 128][/dim]",
    ),
]
Miss = Annotated[
    str | None,
    typer.Option(
        callback=one_of("miss policy", MISS_POLICIES),
        help=f"What a new outlier column does: {', '.join(MISS_POLICIES)}.  [dim]\\[default: exact][/dim]",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Quantize every eligible linear, even where that is not faster.")
]
TextFile = Annotated[
    Path,
    typer.Option(
        "--text", exists=True, dir_okay=False, readable=True, help="Text file in UTF-8.", show_default=False
    ),
]
StatsFile = Annotated[
    Path | None,
    typer.Option(
        "--stats",
        exists=True,
        dir_okay=False,
        readable=True,
        help="Statistics written by [bold]mixq calibrate[/bold].",
    ),
]
Lowering = Annotated[
    str,
    typer.Option(
        hidden=True, callback=one_of("lowering", LOWERINGS), help="What compiles the graphs: for tests."
    ),
]
