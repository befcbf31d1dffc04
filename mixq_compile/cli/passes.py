"""`mixq passes`: the passes, their options and their contracts."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixq_compile.cli.options import Json
from mixq_compile.cli.output import console, print_json

if TYPE_CHECKING:
    from mixq_compile.pipeline import Pass

CONTRACT = ("requires", "establishes", "invalidates")


def passes(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Show these passes only.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """List the passes that rewrite a graph, with their options.

    A pass is written as name{option=value option=value}, and a pipeline is passes with commas between
    them. `mixq pipelines` shows the pipelines that have names.

    Example: [bold]mixq passes select-scheme[/bold]
    """
    from mixq_compile.pipeline import get_pass, pass_names

    found = [describe(get_pass(name)) for name in names or pass_names()]
    if json:
        print_json(found)
        return
    target = console()
    for entry in found:
        target.print(f"[bold]{entry['name']}[/bold]  ", end="")
        target.print(entry["summary"], markup=False)
        for fact in CONTRACT:
            if entry[fact]:
                target.print(f"    {fact} {', '.join(entry[fact])}", markup=False, style="dim")
        for option in entry["options"]:
            target.print(f"    {option['name']}={option['default']}", markup=False, style="cyan", end="")
            target.print(f"  {option['doc']}", markup=False)


def describe(kind: type[Pass]) -> dict[str, Any]:
    """A pass as JSON-able data: summary, contract, and options with defaults as a pipeline writes them."""
    from mixq_compile.pipeline.options import format_value
    from mixq_compile.pipeline.registry import option_types

    documentation = field_documentation(kind)
    return {
        "name": kind.name,
        "summary": first_line(kind),
        **{fact: sorted(getattr(kind, fact)) for fact in CONTRACT},
        "options": [
            {
                "name": option.name,
                "type": str(option_types(kind)[option.name]),
                "default": format_value(option.default),
                "doc": documentation.get(option.name, ""),
            }
            for option in dataclasses.fields(kind)
        ],
    }


def first_line(documented: object) -> str:
    """The first line of a documentation string."""
    return (inspect.getdoc(documented) or "").split("\n")[0]


def field_documentation(kind: type) -> dict[str, str]:
    """The texts below a class's fields, which Python itself does not keep."""
    try:
        (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            found[statement.target.id] = " ".join(str(following.value.value).split())
    return found
