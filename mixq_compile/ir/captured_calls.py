"""Reading calls as a model's capture wrote them: functions and methods that have no schema."""

from __future__ import annotations

from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg


def captured_argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a captured call, wherever the model's code put it: in order, or by its name.

    For operators that have a schema, `mixq::` ones above all, there is `ops.operands.operand`.
    """
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def captured_rest(node: Node, position: int, name: str) -> tuple[Any, ...]:
    """A list argument of a captured call, be it given as a list or item by item: `permute(0, 2, 1)`."""
    given = captured_argument(node, position, name)
    return tuple(given) if isinstance(given, (list, tuple)) else tuple(node.args[position:])


def times_read(node: Node, source: Node) -> int:
    """How many arguments of a call, those in lists too, are a certain node."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), lambda each: found.append(each) if each is source else None)
    return len(found)
