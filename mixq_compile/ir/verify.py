"""Checks that what a graph records is what its operators compute."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import Node
from torch.utils._pytree import tree_flatten

from mixq_compile.ir.effects import inside_transforms, is_in_place, is_reshaped_later
from mixq_compile.ir.evaluate import UnknownValueError
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.shapes import hint_of


@functools.cache
def _data_dependent() -> tuple[type[Exception], ...]:
    """What an operator raises whose result depends on data; sympy behind one of them takes long to import."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


_AUTOCAST_ENTER = torch.amp.autocast_mode._enter_autocast
_AUTOCAST_EXIT = torch.amp.autocast_mode._exit_autocast


@dataclass(frozen=True)
class Violation:
    """Something in a graph that does not hold."""

    node: str
    """Name of the node; empty for the graph as a whole."""
    message: str


def verify(graph: CapturedGraph, nodes: Iterable[Node] | None = None) -> list[Violation]:
    """What is wrong with a graph, or with the given nodes of it.

    The structure is always checked in full. Shapes, dtypes and devices are checked by running each
    operator on the recorded values of its inputs, which `Graph.lint` does not do; calls that write
    their arguments in place, depend on data, or run under autocast or inside a transform are taken as they
    are.
    """
    violations = _structure(graph)
    if violations:
        return violations
    chosen = None if nodes is None else set(nodes)
    transformed = inside_transforms(graph.graph.nodes)
    autocast = 0
    for node in graph.graph.nodes:
        if node.target is _AUTOCAST_ENTER:
            autocast += 1
        elif node.target is _AUTOCAST_EXIT:
            autocast -= 1
        if chosen is None or node in chosen:
            taken = autocast or node in transformed
            problems = [_annotations(node), None if taken else _value(graph, node)]
            violations += [Violation(node.name, problem) for problem in problems if problem is not None]
    return violations


def _structure(graph: CapturedGraph) -> list[Violation]:
    found: list[Violation] = []
    for node in graph.graph.nodes:
        if node.op == "get_attr" and graph.attribute(str(node.target)) is None:
            found.append(Violation(node.name, f"reads {node.target!r}, which the module does not have"))
    if not found:
        try:
            graph.graph.lint()
        except (RuntimeError, ValueError, AttributeError) as error:
            found.append(Violation("", shortened(str(error))))
    return found


def _annotations(node: Node) -> str | None:
    custom = node.meta.get("custom", {})
    try:
        json.dumps(custom, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"meta['custom'] must be JSON, and {custom!r} is not: {error}."
    return None


def _value(graph: CapturedGraph, node: Node) -> str | None:
    """Why the recorded value of a node is wrong; None where it is right or cannot be checked."""
    recorded = graph.value(node)
    if node.op == "get_attr":
        held = graph.attribute(str(node.target))
        return _difference(recorded, held) if isinstance(held, Tensor) and recorded is not None else None
    if node.op not in ("call_function", "call_method") or recorded is None or is_in_place(node):
        return None
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    if graph.is_computed(node) or any(is_reshaped_later(known) for known in (node, *node.all_input_nodes)):
        return None
    try:
        computed = graph.evaluate(node.target, node.args, node.kwargs)
    except UnknownValueError:
        return None
    except Exception as error:
        if isinstance(error, _data_dependent()) or isinstance(error.__cause__, _data_dependent()):
            return None
        return f"its operator refuses its inputs: {type(error).__name__}: {_first_line(error)}"
    difference = _difference(recorded, computed)
    if difference is None:
        graph.note_computed(node)
    return difference


LINES_SHOWN, COLUMNS_SHOWN = 8, 400


def shortened(text: str) -> str:
    """The beginning of an error's text: torch.fx appends the whole graph to some."""
    lines = text.partition("\ngraph():")[0].splitlines() or [""]
    shown = [
        line if len(line) <= COLUMNS_SHOWN else f"{line[:COLUMNS_SHOWN]}…" for line in lines[:LINES_SHOWN]
    ]
    left = len(text.splitlines()) - len(shown)
    return "\n".join([*shown, f"… and {left} lines more"] if left > 0 else shown)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _difference(recorded: Any, computed: Any) -> str | None:
    records, structure = tree_flatten(recorded)
    results, result_structure = tree_flatten(computed)
    if len(records) != len(results):
        return f"records {structure.num_leaves} results, its operator gives {result_structure.num_leaves}"
    for record, result in zip(records, results, strict=True):
        if isinstance(record, Tensor) != isinstance(result, Tensor):
            return f"records {type(record).__name__}, its operator gives {type(result).__name__}"
        if isinstance(record, Tensor) and not _same_tensor(record, result):
            return f"records {describe(record)}, its operator gives {describe(result)}"
    return None


def _same_tensor(left: Tensor, right: Tensor) -> bool:
    if (left.dtype, left.device, left.dim()) != (right.dtype, right.device, right.dim()):
        return False
    return all(_may_be_equal(one, other) for one, other in zip(left.shape, right.shape, strict=True))


def _may_be_equal(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """False where two sizes are known to differ; compares traced values, since `==` would add a guard."""
    one, other = hint_of(left), hint_of(right)
    return one is None or other is None or one == other


def describe(value: Any) -> str:
    """A value in a line: `float32[2, s0, 64]`, `(int8[4, 8], float32[4])`, `s0`."""
    if isinstance(value, Tensor):
        sizes = ", ".join([str(size) if isinstance(size, int) else _size_name(size) for size in value.shape])
        text = f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
        return text if value.device.type == "cpu" else f"{text} {value.device}"
    if isinstance(value, torch.SymInt):
        return _size_name(value)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe(item) for item in value)})"
    return "" if value is None else str(value)


def _size_name(size: torch.SymInt) -> str:
    return _expression_name(size.node.expr)


@functools.lru_cache(maxsize=4096)
def _expression_name(expression: Any) -> str:
    """Printing a symbolic size takes longer than all else in a snapshot, and a graph has few of them."""
    return str(expression)
