"""A graph as a value: one row a node, text and numbers only, so that it outlives the graph."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from mixq_compile.ir import names
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.verify import describe
from mixq_compile.ops.operands import Signature, signature_of

_NAMED = re.compile(r"([A-Za-z_]\w*)=(?!=)")
"""How an argument begins that is given by its name; others begin with `%`, a quote, a bracket or a digit."""


@dataclass(frozen=True)
class NodeRow:
    """One node of a snapshot."""

    name: str
    op: str
    """What kind of node: placeholder, get_attr, call_function, call_method, call_module, output."""
    target: str
    """What it calls or reads, such as `aten.linear.default`."""
    args: str
    """Its arguments as a program writes them."""
    inputs: tuple[str, ...]
    """Names of the nodes it reads, each once."""
    value: str
    """Type and shape of its result, such as `float32[2, 8, 64]`."""
    fqn: str
    """The module it belongs to; of a placeholder, the parameter it stands for."""
    where: str
    """The line of the model's Python code."""
    annotations: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON-able data."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NodeRow:
        """The row that `to_json` wrote."""
        return cls(**{**data, "inputs": tuple(data["inputs"])})

    @property
    def arguments(self) -> tuple[str, ...]:
        """The text of each argument, those that are given by name with it."""
        return tuple(_split(self.args))

    @property
    def operands(self) -> dict[str, str]:
        """The text of each operand that the call gives, by its name in the operator's schema.

        Empty for a target that has none.
        """
        signature = _signature(self.target) if self.op == "call_function" else None
        if signature is None:
            return {}
        pairs = [(_NAMED.match(text), text) for text in self.arguments]
        named = {match[1]: text[match.end() :] for match, text in pairs if match is not None}
        return signature.bind([text for match, text in pairs if match is None], named)

    @property
    def line(self) -> str:
        """The node as a line of a program, with its value's type behind it."""
        call = f"{self.target}({self.args})" if self.op.startswith("call") else f"{self.op}[{self.target}]"
        text = f"return {self.args}" if self.op == "output" else f"{self.name} = {call}"
        return f"{text}  # {self.value}" if self.value else text


@dataclass(frozen=True)
class Snapshot:
    """All nodes of a graph at one moment, in order."""

    rows: tuple[NodeRow, ...]

    @classmethod
    def of(cls, graph: CapturedGraph) -> Snapshot:
        """The snapshot of a graph as it is now."""
        return cls(tuple([row_of(graph, node) for node in graph.graph.nodes]))

    def updated(self, graph: CapturedGraph, touched: Collection[Node]) -> Snapshot:
        """The snapshot of the same graph now, where only these nodes are new or changed."""
        known = self.by_name
        return Snapshot(
            tuple([row_of(graph, n) if n in touched else known[n.name] for n in graph.graph.nodes])
        )

    @functools.cached_property
    def by_name(self) -> dict[str, NodeRow]:
        """The rows by node name."""
        return {row.name: row for row in self.rows}

    @property
    def text(self) -> str:
        """The graph as a program, one line a node."""
        return "\n".join(row.line for row in self.rows)

    def op_counts(self) -> dict[str, int]:
        """How often each target is called, by target."""
        counts: dict[str, int] = {}
        for row in self.rows:
            if row.op.startswith("call"):
                counts[row.target] = counts.get(row.target, 0) + 1
        return counts

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as JSON-able data."""
        return [row.to_json() for row in self.rows]

    @classmethod
    def from_json(cls, data: list[dict[str, Any]]) -> Snapshot:
        """The snapshot that `to_json` wrote."""
        return cls(tuple(NodeRow.from_json(row) for row in data))


def target_name(target: Any) -> str:
    """What a node calls, as a reader would write it."""
    return target if isinstance(target, str) else _function_name(target)


@functools.lru_cache(maxsize=4096)
def _function_name(target: Callable[..., Any]) -> str:
    if hasattr(target, "_schema"):
        return str(target)
    name = getattr(target, "__name__", str(target))
    module = getattr(target, "__module__", None) or ""
    return name if module in ("", "_operator", "builtins") else f"{module.removeprefix('torch.')}.{name}"


@functools.lru_cache(maxsize=1024)
def _signature(target: str) -> Signature | None:
    """The signature of an operator by its text, such as `aten.linear.default`; None for anything else."""
    parts = target.split(".")
    found: Any = torch.ops
    if len(parts) != 3:
        return None
    for part in parts:
        found = getattr(found, part, None)
    return signature_of(found) if hasattr(found, "_schema") else None


def _split(text: str) -> Iterator[str]:
    """The arguments in a text that `_argument` wrote: commas within brackets and quotes divide none."""
    depth, quote, start, place = 0, "", 0, 0
    while place < len(text):
        letter = text[place]
        if quote:
            place += letter == "\\"
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:place].strip()
            start = place + 1
        place += 1
    if text[start:].strip():
        yield text[start:].strip()


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_argument(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_argument(item)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return f"slice({', '.join(_argument(part) for part in parts)})"
    return repr(value)


def row_of(graph: CapturedGraph, node: Node) -> NodeRow:
    """The row of one node."""
    arguments = [_argument(value) for value in node.args]
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    annotations = Annotations(node).to_json()
    return NodeRow(
        name=node.name,
        op=node.op,
        target=target_name(node.target),
        args=", ".join(arguments),
        inputs=tuple(source.name for source in node.all_input_nodes),
        value=describe(graph.value(node)),
        fqn=annotations.get("fqn") or graph.parameter_name(node) or graph.fqn(node),
        where=names.location(node),
        annotations=dict(annotations),
    )
