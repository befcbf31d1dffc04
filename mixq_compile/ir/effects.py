"""Which calls write, and must stay although nothing reads their result."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import Node
from torch.fx.node import map_arg

_INPLACE_OPERATORS = frozenset(
    function
    for name, function in vars(operator).items()
    if name in ("setitem", "delitem") or (name.startswith("i") and hasattr(operator, f"__{name}__"))
) - {operator.index, operator.invert, operator.inv}

_RESHAPING = frozenset(
    {"as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_"}
    | {"transpose_", "unsqueeze_"}
)


def is_reshaped_later(node: Node) -> bool:
    """True where a call changes the shape of a node's value in place: its record shows the last shape."""
    return any(reader.args[:1] == (node,) and _name(reader) in _RESHAPING for reader in node.users)


def _name(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_in_place(node: Node) -> bool:
    """True for a call that may change shape or contents of an argument, so that it runs only once."""
    if node.op == "call_method":
        return _name(node).endswith("_") or _name(node) == "__setitem__"
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace == "aten" and node.target._schema.is_mutable
    if node.target in _INPLACE_OPERATORS or "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return True
    return _name(node).endswith("_")


def is_region(node: Node) -> bool:
    """True for a call that runs a graph of its own, such as a region under autocast or a branch."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _is_of_functorch(node: Node) -> bool:
    return node.op == "call_function" and "functorch" in str(getattr(node.target, "__module__", ""))


def _sets_a_mode(node: Node) -> bool:
    """True for a function, no operator, whose result no capture recorded: it begins or ends something."""
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return False
    recorded = [node.meta[key] for key in ("val", "example_value") if key in node.meta]
    begins_or_ends = str(getattr(node.target, "__module__", "")).startswith("torch")
    return begins_or_ends and all(value is None for value in recorded)


def inside_transforms(nodes: Iterable[Node]) -> frozenset[Node]:
    """The nodes that run inside a transform of functorch, such as vmap, its begin and end among them.

    Their recorded values lack the dimensions or tangents that the transform adds, and none of them can be
    evaluated without the calls before it.
    """
    depth = 0
    found = []
    for node in nodes:
        name = _name(node) if node.op == "call_function" else ""
        begins = name.endswith("_increment_nesting") or name == "_enter_dual_level"
        ends = name.endswith("_decrement_nesting") or name == "_exit_dual_level"
        depth += begins
        if depth or _is_of_functorch(node):
            found.append(node)
        depth -= ends
    return frozenset(found)


def has_effect(node: Node) -> bool:
    """True for a node that dead-code elimination must keep.

    Beside what torch.fx knows: operators that write an argument (outlier state), the in-place methods and
    functions of the torch-level graphs that Dynamo captures, and the calls that begin and end a transform
    or a mode.
    """
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if node.op == "get_attr":
        return False
    if is_in_place(node) or is_region(node) or _is_of_functorch(node) or _sets_a_mode(node):
        return True
    schema = getattr(node.target, "_schema", None)
    return (schema is not None and bool(schema.is_mutable)) or node.is_impure()


def written_nodes(node: Node) -> list[Node]:
    """The arguments that an operator with a schema writes."""
    schema = getattr(node.target, "_schema", None)
    found: list[Node] = []
    for place, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            map_arg(given, found.append)
    return found


def writer_between(value: Node, first: Node, last: Node) -> Node | None:
    """The first call between two nodes that may change a value in place; None where none does."""
    node = first
    while node is not last:
        if is_in_place(node) and node.args and _may_alias(node.args[0], value):
            return node
        node = node.next
    return None


def _may_alias(node: object, value: Node) -> bool:
    """True where a node is a value, or was made from it along first arguments, as views are."""
    while isinstance(node, Node):
        if node is value:
            return True
        node = node.args[0] if node.args else None
    return False
