"""`mixq inspect`: what each pass changed in a model's graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixq_compile.cli.inspecting import Errors, Figures, inspection_of
from mixq_compile.cli.inspection_options import CaptureOptions, InspectedModel, PipelineChoice
from mixq_compile.cli.output import check_file, console, print_json, print_table, step
from mixq_compile.errors import unknown_name

if TYPE_CHECKING:
    from rich.console import Console

    from mixq_compile.inspection.inspection import InspectedGraph, Inspection
    from mixq_compile.ir.snapshot import NodeRow
    from mixq_compile.pipeline.history import PassRecord

ALL, CHANGED = "all", "changed"
STDOUT = "-"
OPERATORS_SHOWN = 12


def inspect(
    model: InspectedModel,
    choice: PipelineChoice,
    capture: CaptureOptions,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="PASS",
            help="Print what a pass changed, as a patch: its name or number; all; or changed, which is every "
            "pass that changed something.",
        ),
    ] = None,
    fqn: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Print only nodes of these layers: a name, a part of one, a glob."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report: one page that needs no network.")
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write everything as JSON; - is stdout. Other commands read it."),
    ] = None,
    print_after_all: Annotated[
        bool,
        typer.Option(
            "--print-after-all",
            help="Print the whole program as captured and after each pass, a line a node.",
        ),
    ] = False,
    dump_pipeline: Annotated[
        bool, typer.Option("--dump-pipeline", help="Print the pipeline's text with all options, and stop.")
    ] = False,
    reproducer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where a pass fails: write a folder that shows it by itself."),
    ] = None,
    errors: Errors = False,
    figures: Figures = "auto",
) -> None:
    """Run the passes over a model's graph and show what each of them changed.

    The model is captured by torch.export; nothing is compiled, and no GPU is needed. MODEL may also be a
    file that this command wrote (--json, --html): it is then shown again, without the model.

    Example: [bold]mixq inspect MODEL[/bold] (the table of passes)  ·  [bold]mixq inspect MODEL --after
    rewrite-mixed-linear --fqn '*.0.*q_proj'[/bold] (one rewrite as a patch)  ·  [bold]mixq inspect MODEL
    --html report.html[/bold]  ·  [bold]mixq inspect llama-2-7b --no-weights[/bold]
    """
    from mixq_compile.inspection.files import save_json

    _check_targets(html, json)
    if dump_pipeline:
        print(_pipeline_of(model, capture, choice))
        return
    inspection = inspection_of(model, capture, choice, errors=errors, figures=figures, reproducer=reproducer)
    if json == STDOUT:
        print_json(inspection.to_json())
        return
    if json is not None:
        save_json(inspection, Path(json))
    if html is not None:
        from mixq_compile.inspection.html import save_html

        with step(f"writing {html}"):
            save_html(inspection, html)
    _print_heading(inspection)
    for graph in inspection.graphs:
        if len(inspection.graphs) > 1:
            console().print(f"\ngraph {graph.name}", style="bold", markup=False)
        if print_after_all:
            _print_programs(graph)
        elif after is not None:
            _print_changes(graph, after, fqn)
        else:
            _print_overview(graph)


def _check_targets(html: Path | None, json: str | None) -> None:
    """Raises OptionError for files that could not be written, before the model is loaded."""
    for option, target in (("--html", html), ("--json", Path(json) if json not in (None, STDOUT) else None)):
        if target is not None:
            check_file(option, target)


def _pipeline_of(model: str, capture: CaptureOptions, choice: PipelineChoice) -> str:
    choice.options()  # before the model is loaded: wrong ones are found at once
    return str(choice.pipeline_of(capture.capture(model).graph()))


def _print_heading(inspection: Inspection) -> None:
    target = console()
    times = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in inspection.seconds.items())
    target.print(f"{inspection.model}  ({inspection.inputs})", style="bold", markup=False)
    target.print(times, style="dim", markup=False)
    for note in inspection.notes:
        target.print(f"note: {note}", style="yellow", markup=False)


def _print_overview(graph: InspectedGraph) -> None:
    from mixq_compile.inspection.text import operator_changes, print_history

    target = console()
    print_history(graph.history, target)
    rows = [(name, str(before), str(after)) for name, before, after in operator_changes(graph.history)]
    if rows:
        title = f"operators called, of {len(rows)} that changed"
        print_table(target, title, ("operator", "before", "after"), rows[:OPERATORS_SHOWN])
    quantized = [layer for layer in graph.layers if layer.scheme is not None]
    target.print(
        f"{len(quantized)} of {len(graph.layers)} linears quantized. What each pass changed: --after PASS; "
        "which layers it touched: mixq layers; why a layer was left alone: mixq explain.",
        markup=False,
    )


def _print_programs(graph: InspectedGraph) -> None:
    from mixq_compile.inspection.text import print_program

    target = console()
    _print_state(target, 0, "as captured")
    print_program(graph.history.snapshot(0), target)
    for record in graph.history.records:
        _print_state(target, record.index, f"after {record.spec}")
        print_program(graph.history.snapshot(record.index), target)


def _print_state(target: Console, index: int, what: str) -> None:
    """Prints the heading of a state as a comment of the program that follows."""
    target.print(f"\n# {index}: {what}", style="bold cyan", markup=False, soft_wrap=True)


def _print_changes(graph: InspectedGraph, after: str, fqn: str | None) -> None:
    """Prints the changes of the chosen passes, those of the layers that `fqn` means."""
    from mixq_compile.inspection.layers import lies_in
    from mixq_compile.inspection.text import node_changes, print_patch

    if fqn is not None and not any(lies_in(row.fqn, fqn) for row in _all_rows(graph)):
        raise unknown_name("layer", fqn, [layer.fqn for layer in graph.layers])

    def wanted(row: NodeRow) -> bool:
        return fqn is None or lies_in(row.fqn, fqn)

    target = console()
    for record in _chosen_records(graph, after):
        _print_state(target, record.index, f"{record.spec}  {node_changes(record)}")
        if record.diff is None:
            target.print("the run took no snapshots", style="dim")
            continue
        before = graph.history.snapshot(record.index - 1)
        printed = print_patch(before, record.diff, wanted, target)
        if not printed:
            target.print("nothing changed" + (f" in {fqn}" if fqn else ""), style="dim", markup=False)


def _all_rows(graph: InspectedGraph) -> list[NodeRow]:
    history = graph.history
    added = (row for record in history.records if record.diff for row in record.diff.added)
    return [*(history.initial.rows if history.initial is not None else ()), *added]


def _chosen_records(graph: InspectedGraph, after: str) -> list[PassRecord]:
    """The passes that a name, a number, `all` or `changed` means. Raises OptionError for anything else."""
    records = graph.history.records
    if after == ALL:
        return list(records)
    if after == CHANGED:
        return [record for record in records if record.diff]
    found = [
        record
        for record in records
        if after in (str(record.index), record.spec, record.spec.partition("{")[0])
    ]
    if not found:
        names = [record.spec.partition("{")[0] for record in records]
        raise unknown_name("pass of this run", after, [*names, ALL, CHANGED])
    return found
