"""`mixq diff`: what differs between two compilations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixq_compile.cli.capturing import EXPORTED
from mixq_compile.cli.inspecting import Errors, inspection_of, inspection_of_captured
from mixq_compile.cli.inspection_options import CaptureOptions, PipelineChoice
from mixq_compile.cli.options import Json, valid
from mixq_compile.cli.output import console, print_json
from mixq_compile.cli.running import FAILURE
from mixq_compile.errors import OptionError
from mixq_compile.schemes.registry import accepted_names, get_scheme

if TYPE_CHECKING:
    from mixq_compile.inspection.inspection import Inspection

OF_PIPELINE = tuple(field.name for field in dataclasses.fields(PipelineChoice))
OF_CAPTURE = tuple(field.name for field in dataclasses.fields(CaptureOptions))


def diff(
    context: typer.Context,
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A file that [bold]mixq inspect[/bold] wrote (.json, .html), an exported .pt2, or a model.",
            show_default=False,
        ),
    ],
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="B",
            help="The same; left out: A once more, as --against or --against-scheme says.",
            show_default=False,
        ),
    ] = None,
    *,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PIPELINE",
            help="Without B: run this pipeline over A too, and compare with that of --pipeline.",
            show_default=False,
        ),
    ] = None,
    against_scheme: Annotated[
        str | None,
        typer.Option(
            callback=valid(get_scheme),
            help=f"Without B: compare --scheme with this one: {', '.join(accepted_names())}.",
            show_default=False,
        ),
    ] = None,
    fqn: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Compare only these layers: a name, a part of one, a glob."),
    ] = None,
    lines: Annotated[int, typer.Option(min=0, help="Most lines of nodes to print.")] = 40,
    fail_on_change: Annotated[
        bool, typer.Option("--fail-on-change", help="Exit with code 1 where programs or layers differ.")
    ] = False,
    errors: Errors = False,
    json: Json = False,
    choice: PipelineChoice,
    capture: CaptureOptions,
) -> None:
    """Show what differs between two compilations: passes, operators, layers and nodes.

    Nodes are matched by module, operator and surroundings, whatever a capture named them. Times, errors
    and Python lines are no difference, nor are other passes that made the same program.

    Two runs: [bold]mixq inspect MODEL --json before.json[/bold], change something, then, with the same
    options, [bold]mixq diff before.json MODEL[/bold]. In CI, with a saved file as the golden one, add
    [bold]--fail-on-change[/bold], and give both [bold]--force[/bold]: else a measured speed decides which
    linears are quantized, and near 1 it decides now so, now so.

    Two schemes or pipelines over one model, captured once: [bold]mixq diff MODEL --scheme w8a8o16
    --against-scheme w4a8o16 --force[/bold]  ·  [bold]mixq diff MODEL --against
    canonicalize-linear,select-scheme,rewrite-mixed-linear --fqn '*.0.*q_proj'[/bold]

    Two exported programs are compared as they are; with --pipeline or --scheme, after those passes:
    [bold]mixq diff old.pt2 new.pt2[/bold]

    Example: [bold]mixq diff before.json after.json --lines 100[/bold]
    """
    given = {name for name in context.params if _was_given(context, name)}
    if b is not None:
        if against is not None or against_scheme is not None:
            option = "--against" if against is not None else "--against-scheme"
            raise OptionError(
                f"{option} compares two ways to compile A, and B ({b}) was given too: leave out one of them."
            )
        before, after = _of_two(a, b, capture, choice, given, errors=errors)
    else:
        before, after = _of_one(a, capture, choice, against, against_scheme, errors=errors)
    from mixq_compile.inspection.comparison import compare
    from mixq_compile.inspection.comparison_text import print_comparison

    comparison = compare(before, after, fqn)
    if json:
        print_json(comparison.to_json())
    else:
        print_comparison(comparison, console(), lines=lines)
    if fail_on_change and comparison:
        raise typer.Exit(FAILURE)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _of_two(
    a: str, b: str, capture: CaptureOptions, choice: PipelineChoice, given: set[str], *, errors: bool
) -> tuple[Inspection, Inspection]:
    """The inspections that A and B mean; files are read before a model is captured."""
    from mixq_compile.inspection.files import is_inspection_file

    sources = (a, b)
    saved = [source for source in sources if is_inspection_file(Path(source))]
    unused = [name for name in (*OF_PIPELINE, *OF_CAPTURE) if name in given]
    if len(saved) == len(sources) and unused:
        option = f"--{unused[0].replace('_', '-')}"
        raise OptionError(
            f"{option} tells how to compile a model, and A and B are saved inspections that are compared as "
            "they are. Give a model in place of one, or leave the option out."
        )
    as_they_are = all(Path(source).suffix == EXPORTED for source in sources) and given.isdisjoint(OF_PIPELINE)
    if not set(sources) <= set(saved):
        choice.options()  # before anything is loaded: wrong options are found at once
    found = {}
    for source in sorted(sources, key=lambda source: source not in saved):
        if source not in found:
            found[source] = (
                _without_passes(source, capture)
                if as_they_are
                else inspection_of(source, capture, choice, errors=errors)
            )
    return found[a], found[b]


def _without_passes(source: str, capture: CaptureOptions) -> Inspection:
    """The inspection of an exported program as it is."""
    from mixq_compile.inspection.inspection import InspectedGraph, Inspection
    from mixq_compile.ir.snapshot import Snapshot
    from mixq_compile.pipeline import History

    captured = capture.capture(source)
    history = History(pipeline="", initial=Snapshot.of(captured.graph()))
    return Inspection(captured.source, captured.inputs, (InspectedGraph.of(history),))


def _of_one(
    source: str,
    capture: CaptureOptions,
    choice: PipelineChoice,
    against: str | None,
    against_scheme: str | None,
    *,
    errors: bool,
) -> tuple[Inspection, Inspection]:
    """The inspections of two pipelines or schemes over one capture."""
    from mixq_compile.inspection.files import is_inspection_file

    if against is None and against_scheme is None:
        raise OptionError(
            f"there is nothing to compare {source} with: give B, or a second way to compile it with "
            "--against PIPELINE or --against-scheme SCHEME."
        )
    if is_inspection_file(Path(source)):
        raise OptionError(
            f"{source} is a saved inspection, over which no pipeline can run: --against and --against-scheme "
            "take a model or an exported .pt2."
        )
    other = dataclasses.replace(
        choice,
        pipeline=against if against is not None else choice.pipeline,
        scheme=against_scheme if against_scheme is not None else choice.scheme,
    )
    options = choice.options()
    try:
        other_options = other.options()
    except OptionError as error:
        raise OptionError(f"{'--against' if against is not None else '--against-scheme'}: {error}") from error
    captured = capture.capture(source)
    return (
        inspection_of_captured(captured, choice, options, errors=errors),
        inspection_of_captured(captured, other, other_options, errors=errors),
    )
