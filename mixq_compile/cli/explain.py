"""`mixq explain`: every decision about one layer, in order, and what it led to."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixq_compile.cli.inspecting import Errors, Figures, inspection_of
from mixq_compile.cli.inspection_options import CaptureOptions, InspectedModel, PipelineChoice
from mixq_compile.cli.layers import chosen_layers
from mixq_compile.cli.options import Json
from mixq_compile.cli.output import console, print_json
from mixq_compile.inspection.alike import group_alike

if TYPE_CHECKING:
    from rich.console import Console

    from mixq_compile.inspection.explanation import Explanation

_NUMBER = re.compile(r"(_?\d+)+")
MARKS = {"applied": ("✓", "green"), "skipped": ("✗", "yellow"), "noted": ("·", "dim")}


def explain(
    model: InspectedModel,
    fqn: Annotated[
        str,
        typer.Argument(
            metavar="FQN",
            help="The layer: its name, a part of one, or a glob that fits several.",
            show_default=False,
        ),
    ],
    choice: PipelineChoice,
    capture: CaptureOptions,
    errors: Errors = False,
    figures: Figures = "auto",
    json: Json = False,
) -> None:
    """Explain what became of a layer: every decision in order, with its reason, figures and Python line.

    Shows too what computes the layer in the end, which passes made those nodes, and what it costs before
    and after. Layers that are alike but for numbers in their names are explained in one.

    Example: [bold]mixq explain MODEL lm_head[/bold]  ·  [bold]mixq explain MODEL '*.layers.0.*down_proj'
    --scheme w4a8o16[/bold]
    """
    from mixq_compile.inspection.explanation import explanation_of

    inspection = inspection_of(model, capture, choice, errors=errors, figures=figures)
    explanations = [
        explanation_of(graph, layer) for graph in inspection.graphs for layer in chosen_layers(graph, fqn)
    ]
    if json:
        print_json([explanation.to_json() for explanation in explanations])
        return
    by_name = {explanation.layer.fqn: explanation for explanation in explanations}
    for group in group_alike({fqn: _outcome(explanation) for fqn, explanation in by_name.items()}):
        _print(by_name[group.fqns[0]], group.label, console())


def _outcome(explanation: Explanation) -> tuple[Any, ...]:
    """What layers have in common that are explained in one."""
    layer = explanation.layer
    # Numbers in reasons are those of nodes and of layers.
    steps = tuple(
        (step.index, step.decision.verdict, _NUMBER.sub("*", step.decision.reason))
        for step in explanation.steps
    )
    return layer.out_features, layer.in_features, layer.scheme, layer.kernel, layer.skip, steps


def _print(explanation: Explanation, label: str, target: Console) -> None:
    layer = explanation.layer
    shape = f"{layer.out_features}×{layer.in_features} {layer.dtype}" if layer.out_features else "no matrix"
    target.print(f"\n{label}", style="bold", markup=False, end="")
    target.print(f"  {layer.role}, {shape}", markup=False)
    if layer.where:
        target.print(f"  {layer.where}", style="dim", markup=False, soft_wrap=True)
    outcome = f"quantized: {layer.scheme}, by {layer.kernel or 'auto'}"
    target.print(
        f"  {outcome if layer.scheme else f'left alone: {layer.skip}'}",
        style="green" if layer.scheme else "yellow", markup=False, soft_wrap=True,
    )  # fmt: skip
    target.print("\n  decisions", style="bold")
    for step in explanation.steps:
        mark, style = MARKS[step.decision.verdict]
        target.print(
            f"  {mark} {step.index:>2} {step.spec}", style=style, markup=False, end="  ", soft_wrap=True
        )
        target.print(step.decision.reason, markup=False, soft_wrap=True)
        for name, value in step.decision.details.items():
            target.print(f"        {name}: {_value(value)}", style="dim", markup=False, soft_wrap=True)
    target.print("\n  computed by", style="bold")
    for line in explanation.program:
        target.print(f"    {line}", markup=False, soft_wrap=True)
    for name, text in explanation.figures().items():
        target.print(f"  {name}: {text}", markup=False, soft_wrap=True)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {entry}" for key, entry in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
