"""`mixq pipelines`: the pipelines that have names, and their texts."""

from __future__ import annotations

from typing import Annotated

import typer

from mixq_compile.cli.options import Json
from mixq_compile.cli.output import console, print_json
from mixq_compile.errors import unknown_name


def pipelines(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Show these pipelines only.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """List the named pipelines and the passes that each runs.

    A name or such a text goes into options={"pipeline": ...} of torch.compile, or into
    mixq_compile.compile(program, ...). `mixq passes` explains the passes.

    Example: [bold]mixq pipelines jit[/bold]
    """
    from mixq_compile.pipeline import Pipeline, pipeline_names

    for name in names or ():
        if name not in pipeline_names():
            raise unknown_name("pipeline", name, pipeline_names())
    found = {name: Pipeline.named(name) for name in names or pipeline_names()}
    if json:
        print_json(
            [
                {"name": name, "text": str(pipeline), "passes": [step.spec() for step in pipeline]}
                for name, pipeline in found.items()
            ]
        )
        return
    target = console()
    for name, pipeline in found.items():
        target.print(f"[bold]{name}[/bold]")
        target.print(f"  {pipeline}", markup=False, soft_wrap=True)
