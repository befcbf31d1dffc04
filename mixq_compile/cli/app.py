"""The application: every command under its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated

import typer

from mixq_compile.cli.area import area
from mixq_compile.cli.bench import BENCHMARKS, SUMMARY
from mixq_compile.cli.bisect import bisect
from mixq_compile.cli.calibrate import calibrate
from mixq_compile.cli.demo import demo
from mixq_compile.cli.diff import diff
from mixq_compile.cli.doctor import doctor
from mixq_compile.cli.eval import evaluate
from mixq_compile.cli.explain import explain
from mixq_compile.cli.generate import generate
from mixq_compile.cli.inspect import inspect as inspect_command
from mixq_compile.cli.layers import layers
from mixq_compile.cli.passes import passes
from mixq_compile.cli.pipelines import pipelines
from mixq_compile.cli.quantize import quantize
from mixq_compile.cli.running import command
from mixq_compile.cli.tune import tune
from mixq_compile.version import __version__

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "doctor": doctor,
    "calibrate": calibrate,
    "quantize": quantize,
    "eval": evaluate,
    "generate": generate,
    "tune": tune,
    "inspect": inspect_command,
    "layers": layers,
    "explain": explain,
    "diff": diff,
    "bisect": bisect,
    "area": area,
    "passes": passes,
    "pipelines": pipelines,
}


def _new_app() -> typer.Typer:
    return typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


app, bench_app = _new_app(), _new_app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mixq-compile {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Runs transformers with 8- and 4-bit linears, and outlier columns in 16 bit.

    In Python: [bold]torch.compile(model, backend="mixq")[/bold]. Here: see what that gains (demo, bench),
    what it costs in accuracy (eval), and write quantized checkpoints (quantize).

    MODEL, in every command, is a Hugging Face directory or hub name, a directory that
    [bold]mixq quantize[/bold] wrote, or [bold]module:function[/bold], a Python function that returns a
    model or (model, tokenizer).

    See what happened to a graph, pass by pass: inspect, layers, explain, diff, bisect.

    Begin with: [bold]mixq doctor[/bold], then [bold]mixq demo[/bold].

    Every command explains itself: [bold]mixq COMMAND --help[/bold].
    """


def _help(documentation: str | None) -> str:
    """A documentation string without the line ends inside its paragraphs, which typer would keep."""
    paragraphs = inspect.cleandoc(documentation or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


app.callback(help=_help(_root.__doc__))(_root)
for _name, _function in COMMANDS.items():
    app.command(_name, help=_help(_function.__doc__))(command(_function))
for _name, _function in BENCHMARKS.items():
    bench_app.command(_name, help=_help(_function.__doc__))(command(_function))
# Without a callback of its own, typer would take a group of one command for that command.
bench_app.callback(help=_help(SUMMARY))(lambda: None)
app.add_typer(bench_app, name="bench")
