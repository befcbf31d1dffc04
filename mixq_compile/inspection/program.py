"""A snapshot as a Python program: one line a node, with type, shape, scheme and origin behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from mixq_compile.ir.snapshot import NodeRow, Snapshot

HEADER = """\
import operator
from math import inf, nan

import torch
import mixq_compile.ops
from torch import device

"""
INDENT = "    "
_REFERENCE = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|%(\w+)")


def program_text(snapshot: Snapshot) -> str:
    """The graph as a function of its module and inputs, which Python can run.

        namespace = {}
        exec(program_text(snapshot), namespace)
        namespace["forward"](graph_module, *inputs)

    Higher-order operators, which take graphs as arguments, are printed but cannot be run so.
    """
    inputs = [row.name for row in snapshot.rows if row.op == "placeholder"]
    lines = [f"def forward({', '.join(('self', *inputs))}):"]
    lines += [INDENT + program_line(row) for row in snapshot.rows]
    return HEADER + "\n".join(lines) + "\n"


def program_line(row: NodeRow) -> str:
    """One node as a line: what it computes, its type and shape, its scheme, the passes that made it."""
    notes = " | ".join(_notes(row))
    return f"{statement(row)}  # {notes}" if notes else statement(row)


def statement(row: NodeRow) -> str:
    """What a node does, as Python."""
    arguments = _python(row.args)
    if row.op == "output":
        return f"return {arguments.removesuffix(',')}"
    if row.op == "placeholder":
        return f"{row.name} = {row.name}" if not row.value else f"{row.name}"
    if row.op == "get_attr":
        return f"{row.name} = {_attribute(row.target)}"
    if row.op == "call_method":
        receiver, _, rest = arguments.partition(", ")
        return f"{row.name} = {receiver}.{row.target}({rest})"
    if row.op == "call_module":
        return f"{row.name} = {_attribute(row.target)}({arguments})"
    return f"{row.name} = {_function(row.target)}({arguments})"


def _notes(row: NodeRow) -> Iterator[str]:
    if row.value:
        yield row.value
    scheme = row.annotations.get("scheme")
    if scheme:
        yield str(scheme)
    origin = row.annotations.get("origin")
    if origin:
        yield f"by {', '.join(origin)}"


def _python(arguments: str) -> str:
    """Arguments with node names in place of references; quoted texts stay as they are."""
    return _REFERENCE.sub(lambda match: match[1] or match[0], arguments)


def _attribute(target: str) -> str:
    """How to read a dotted attribute, whose parts may be numbers."""
    owner, _, name = target.rpartition(".")
    holder = f"self.get_submodule({owner!r})" if owner else "self"
    return f"{holder}.{name}" if name.isidentifier() else f"getattr({holder}, {name!r})"


def _function(target: str) -> str:
    """How to name a function: an operator of a library, of Python, or a function below torch."""
    first, dot, _ = target.partition(".")
    if not dot:
        return f"operator.{target}"
    return f"torch.{target}" if hasattr(torch, first) else f"torch.ops.{target}"
