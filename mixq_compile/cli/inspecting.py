"""From MODEL to an inspection: capture, run the passes, measure each layer's error."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixq_compile.cli.inspection_options import CaptureOptions, PipelineChoice
from mixq_compile.cli.output import console

if TYPE_CHECKING:
    from mixq_compile.calibration import CalibrationStats
    from mixq_compile.cli.capturing import Captured
    from mixq_compile.inspection.inspection import InspectedGraph, Inspection
    from mixq_compile.inspection.layers import LayerSummary
    from mixq_compile.runtime.options import MixqOptions

Figures = Annotated[
    str,
    typer.Option(
        metavar="FIGURES",
        help="Device of the expected times: h200, measure (this machine), or "
        "float=TFLOP/s,int8=TOP/s,bandwidth=GB/s; auto is h200 on a GPU and measure on a CPU.",
    ),
]
Errors = Annotated[
    bool, typer.Option("--errors/--no-errors", help="Run the model once and measure each layer's SQNR.")
]
FULL_PRECISION = "fp16"
WITHOUT_WEIGHTS = "errors of layers were not measured: the model was captured without weights."
OF_PROGRAM = "errors of layers were not measured: an exported program has no modules to run alone."
CHANGES_INPUTS = {"equalize-inputs", "rotate-inputs"}
OF_UNCHANGED_INPUTS = (
    "errors and outlier columns of layers are those of the model's own inputs and weights, without {passes}."
)


def inspection_of(
    source: str,
    capture: CaptureOptions,
    choice: PipelineChoice,
    *,
    errors: bool,
    figures: str = "auto",
    reproducer: Path | None = None,
) -> Inspection:
    """The inspection that MODEL means: the one in a file, or a new one of a model.

    With `errors` the model is run once, and each layer's own error measured. Where a pass fails, a folder
    that shows it is written to `reproducer`. Raises MixqError; OptionError for wrong input.
    """
    from mixq_compile.inspection.files import is_inspection_file, load_inspection
    from mixq_compile.pipeline import PassError
    from mixq_compile.runtime.candidates import Example
    from mixq_compile.runtime.reproducer import SCRIPT, Finding, require_empty, write_reproducer

    if reproducer is not None:
        require_empty(reproducer)
    path = Path(source).expanduser()
    if is_inspection_file(path):
        return load_inspection(path)
    options = choice.options()  # before the model is loaded: wrong options are found at once
    captured = capture.capture(source)
    try:
        return inspection_of_captured(captured, choice, options, errors=errors, figures=figures)
    except PassError as error:
        if reproducer is None or not captured.has_weights:
            raise
        example = Example(captured.program, captured.args, captured.kwargs)
        pipeline = choice.pipeline_of(captured.graph())
        write_reproducer(reproducer, example, pipeline, Finding(str(error)), options.stats)
        raise PassError(
            f"{error}\n  reproducer: python {reproducer / SCRIPT}", error.record, error.history
        ) from error


def inspection_of_captured(
    captured: Captured, choice: PipelineChoice, options: MixqOptions, *, errors: bool, figures: str = "auto"
) -> Inspection:
    """The inspection of one pipeline over a captured model."""
    from mixq_compile.benchmarking.device_figures import figures_of
    from mixq_compile.inspection.inspection import InspectedGraph, Inspection

    graph = captured.graph()
    pipeline = choice.pipeline_of(graph)
    begin = time.perf_counter()
    history = pipeline.run(graph, choice.context(options))
    seconds = {"capture": captured.seconds, "passes": time.perf_counter() - begin}
    made = InspectedGraph.of(history, figures=figures_of(figures, captured.device))
    notes: tuple[str, ...] = ()
    if errors and not captured.has_weights:
        notes = (WITHOUT_WEIGHTS,)
    elif errors and captured.model is None:
        notes = (OF_PROGRAM,)
    elif errors:
        begin = time.perf_counter()
        made = _with_errors(made, captured, options.stats)
        seconds["errors"] = time.perf_counter() - begin
        changed = {record.spec.split("{")[0] for record in history.records if record.count("applied")}
        if changed & CHANGES_INPUTS:
            notes = (OF_UNCHANGED_INPUTS.format(passes=", ".join(sorted(changed & CHANGES_INPUTS))),)
    return Inspection(captured.source, captured.inputs, (_with_areas(made),), seconds, notes)


def _with_areas(graph: InspectedGraph) -> InspectedGraph:
    """The graph with each layer's circuit area, where what it depends on is known."""
    return dataclasses.replace(
        graph, layers=tuple(dataclasses.replace(layer, area=_area(layer)) for layer in graph.layers)
    )


def _area(layer: LayerSummary) -> float | None:
    """NAND2 equivalents with stages beside the product folded; outlier columns are counted, never guessed."""
    from mixq_compile.area import Assumptions
    from mixq_compile.area.linear_areas import ESTIMATES, NEEDS_COLUMNS, LinearSize, linear_area

    scheme = layer.scheme or FULL_PRECISION
    columns = layer.found_columns if layer.found_columns is not None else layer.calibrated_columns or None
    assumptions = Assumptions(folding="rate-matched")
    known = scheme in ESTIMATES and (scheme not in NEEDS_COLUMNS or columns is not None)
    if not known or not layer.out_features or layer.in_features < assumptions.lanes_k:
        return None
    size = LinearSize(layer.out_features, layer.in_features, outlier_columns=columns)
    return round(linear_area(size, scheme, assumptions).total)


def _with_errors(graph: InspectedGraph, captured: Captured, stats: CalibrationStats | None) -> InspectedGraph:
    """The graph with each layer's SQNR and outlier columns, measured with a bar on stderr."""
    from rich.progress import Progress

    from mixq_compile.benchmarking.layer_errors import layer_errors
    from mixq_compile.inspection.layers import calibrated_columns, schemes_of
    from mixq_compile.selection.statistics import input_statistics

    assert captured.model is not None
    schemes = schemes_of(graph.history)
    with Progress(console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring errors", total=len(schemes))

        def announce(fqn: str) -> None:
            progress.update(task, advance=1, description=fqn)

        found = layer_errors(
            captured.model, schemes, captured.args, captured.kwargs, calibrated_columns(graph.history),
            announce, {fqn: input_statistics(stats, fqn, scheme) for fqn, scheme in schemes.items()},
        )  # fmt: skip
    layers = tuple(
        dataclasses.replace(layer, **dataclasses.asdict(found[layer.fqn])) if layer.fqn in found else layer
        for layer in graph.layers
    )
    return dataclasses.replace(graph, layers=layers)
