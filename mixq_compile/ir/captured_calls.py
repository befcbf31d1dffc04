"""Reading calls as a model's capture wrote them: functions and methods that have no schema."""

from __future__ import annotations

from typing import Any

from torch.fx import Node


def captured_argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a captured call, wherever the model's code put it: in order, or by its name.

    For operators that have a schema, `mixq::` ones above all, there is `ops.operands.operand`.
    """
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
