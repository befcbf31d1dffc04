"""`mixq layers`: which layers each pass touched, and what became of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixq_compile.cli.inspecting import Errors, Figures, inspection_of
from mixq_compile.cli.inspection_options import CaptureOptions, InspectedModel, PipelineChoice
from mixq_compile.cli.options import Json
from mixq_compile.cli.output import console, print_json, print_table
from mixq_compile.errors import MixqError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mixq_compile.inspection.inspection import InspectedGraph, Inspection
    from mixq_compile.inspection.layers import LayerSummary


def layers(
    model: InspectedModel,
    choice: PipelineChoice,
    capture: CaptureOptions,
    fqn: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Only these layers: a name, a part of one, a glob."),
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="A row for each layer; else those that are alike share one.")
    ] = False,
    errors: Errors = True,
    figures: Figures = "auto",
    json: Json = False,
) -> None:
    """Show which layers each pass touched, and what became of each: scheme, kernel, outliers, error, cost.

    The model is run once, and each quantized layer by itself on what the original model feeds it: SQNR is
    the error that this layer adds (40 dB is one percent). Expected times are a roofline over the device's
    figures, without launches and caches: they rank layers, and `mixq bench layers` measures them.

    Example: [bold]mixq layers MODEL[/bold]  ·  [bold]mixq layers MODEL --fqn down_proj --each[/bold]  ·
    [bold]mixq layers llama-2-7b --force --figures h200[/bold]
    """
    inspection = inspection_of(model, capture, choice, errors=errors, figures=figures)
    chosen = {graph.name: chosen_layers(graph, fqn) for graph in inspection.graphs}
    if not any(chosen.values()):
        raise MixqError(f"{model}: the passes saw no linear, so there is no layer to show.")
    if json:
        print_json(_data(inspection, chosen))
        return
    _print(inspection, chosen, each=each)


def chosen_layers(graph: InspectedGraph, pattern: str | None) -> tuple[LayerSummary, ...]:
    """The layers that a pattern means. Raises OptionError, with the nearest name, where it means none."""
    from mixq_compile.inspection.layers import matching

    if pattern is None:
        return graph.layers
    names = set(matching([layer.fqn for layer in graph.layers], pattern))
    if not names and graph.layers:
        raise unknown_name("layer", pattern, [layer.fqn for layer in graph.layers])
    return tuple(layer for layer in graph.layers if layer.fqn in names)


def _data(inspection: Inspection, chosen: Mapping[str, Sequence[LayerSummary]]) -> dict[str, Any]:
    from mixq_compile.inspection.blast_radius import touches

    return {
        "model": inspection.model,
        "inputs": inspection.inputs,
        "notes": inspection.notes,
        "graphs": [
            {
                "name": graph.name,
                "layers": [
                    {
                        **dataclasses.asdict(layer),
                        "passes": {
                            record.spec: dataclasses.asdict(touch)
                            for record in graph.history.records
                            if (touch := touches(record, [layer]).get(layer.fqn)) is not None
                        },
                    }
                    for layer in chosen[graph.name]
                ],
            }
            for graph in inspection.graphs
        ],
    }


def _print(inspection: Inspection, chosen: Mapping[str, Sequence[LayerSummary]], *, each: bool) -> None:
    from mixq_compile.inspection.layer_tables import cost_table, summary_table, touch_table

    target = console()
    target.print(f"{inspection.model}  ({inspection.inputs})", style="bold", markup=False)
    for note in inspection.notes:
        target.print(f"note: {note}", style="yellow", markup=False)
    for graph in inspection.graphs:
        shown = chosen[graph.name]
        if len(inspection.graphs) > 1:
            target.print(f"\ngraph {graph.name}", style="bold", markup=False)
        tables = (
            (touch_table(graph, shown, each=each), 1),
            (summary_table(shown, each=each), 3),
            (cost_table(shown, each=each), 1),
        )
        for table, left in tables:
            print_table(target, table.title, table.columns, table.rows, left=left)
            if table.legend:
                target.print(table.legend, style="dim", markup=False)
        before = sum(layer.bytes_before for layer in shown)
        after = sum(layer.bytes_after for layer in shown)
        quantized = sum(layer.scheme is not None for layer in shown)
        target.print(
            f"{quantized} of {len(shown)} linears quantized; their weights: {before / 2**20:.1f} MiB before, "
            f"{after / 2**20:.1f} after. Why one was left alone: mixq explain {inspection.model} FQN",
            markup=False,
        )
