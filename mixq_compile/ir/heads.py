"""Which linear of a graph makes its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Node

from mixq_compile.ir.effects import is_region
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.roles import LM_HEAD, OTHER, may_be_head

EMBEDDINGS = (nn.functional.embedding, torch.ops.aten.embedding.default)


def makes_output(graph: CapturedGraph, linear: Node) -> bool:
    """True where what follows a linear only picks from its result or computes on it alone.

    Calls that read a weight or another floating-point value of the model, as a further linear or the addition
    of a residual does, make the output themselves.
    """
    known, waiting, reached = {linear}, [linear], False
    while waiting:
        for reader in waiting.pop().users:
            if reader.op == "output":
                reached = True
            elif reader not in known:
                if is_region(reader) or any(_adds(graph, source) for source in _others(reader, known)):
                    return False
                known.add(reader)
                waiting.append(reader)
    return reached


def _others(node: Node, known: set[Node]) -> list[Node]:
    return [source for source in node.all_input_nodes if source not in known]


def _adds(graph: CapturedGraph, source: Node) -> bool:
    """True for a weight or an activation; false for an input of the model, a bias, an index and a number."""
    value = graph.value(source)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
        return False
    return source.op != "placeholder" if (owned := graph.tensor(source)) is None else owned.dim() > 1


def vocabulary(graph: CapturedGraph) -> int | None:
    """How many rows the largest table has that the graph looks up rows of; None where it has none."""
    lookups = (node for node in graph.graph.nodes if node.target in EMBEDDINGS)
    tables = [graph.tensor(source) for node in lookups for source in node.all_input_nodes]
    return max((table.shape[0] for table in tables if table is not None), default=None)


def role_by_place(graph: CapturedGraph, linear: Node, fqn: str, role: str, features: tuple[int, int]) -> str:
    """The role that the name suggests, corrected where the graph shows what makes the model's output.

    A linear named like a head is one only if it makes the output. One of any name is if it makes the output
    and has a row for each entry of the vocabulary that the model looks up.
    """
    if role == LM_HEAD and may_be_head(fqn):
        return role if makes_output(graph, linear) else OTHER
    if role == OTHER and features[0] != features[1] and features[0] == vocabulary(graph):
        return LM_HEAD if makes_output(graph, linear) else role
    return role
