"""Calls that run a graph of their own: those without meaning at inference, and what others hold."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from mixq_compile.ir.effects import inside_transforms, is_region
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.linear_spellings import Attribute, spelled_linear

AUTOCAST = "wrap_with_autocast"
GRADIENTS = "wrap_with_set_grad_enabled"
TRANSPARENT = (
    AUTOCAST, GRADIENTS, "tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "invoke_subgraph",
)  # fmt: skip
"""Regions that compute what their graph computes; those under autocast only where that casts nothing."""


@dataclass(frozen=True)
class HeldLinear:
    """A linear in the graph of a region that stays."""

    fqn: str
    weight: Node | None
    """The node of the outermost graph that gives the region its weight; None for a computed weight."""


def region_name(node: Node) -> str:
    """The name of a region's operator, such as `cond`."""
    return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]


def _graphs(graph: CapturedGraph, region: Node) -> dict[Node, GraphModule]:
    found = (
        (node, graph.attribute(str(node.target))) for node in region.all_input_nodes if node.op == "get_attr"
    )
    return {node: module for node, module in found if isinstance(module, GraphModule)}


def _operands(region: Node, graphs: Mapping[Node, GraphModule]) -> list[Any]:
    """What a region is given beside its graphs, in order."""
    given: list[Node] = []
    map_arg((region.args, region.kwargs), lambda node: given.append(node) if node not in graphs else None)
    return given


def _placeholders(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _inner(graph: CapturedGraph, region: Node, module: GraphModule) -> tuple[CapturedGraph, dict[str, Node]]:
    """The capture of one graph of a region, and the nodes that its placeholders stand for."""
    operands = _operands(region, _graphs(graph, region))
    placeholders = _placeholders(module)
    # What a region adds, such as the two elements of a scan, comes before what is passed on.
    shared = min(len(operands), len(placeholders))
    names = [node.name for node in placeholders[len(placeholders) - shared :]]
    given = dict(zip(names, operands[len(operands) - shared :], strict=True))
    return graph.inner(module, given), given


def held_linears(graph: CapturedGraph, region: Node) -> list[HeldLinear]:
    """The linears in all graphs of a region and in those that these hold, each once."""
    found: dict[str, HeldLinear] = {}
    for module in _graphs(graph, region).values():
        inner, given = _inner(graph, region, module)
        for linear in _linears_of(inner):
            weight = given.get(linear.weight.name) if linear.weight is not None else None
            found.setdefault(linear.fqn, HeldLinear(linear.fqn, weight))
    return list(found.values())


def _linears_of(graph: CapturedGraph) -> Iterator[HeldLinear]:
    for node in graph.graph.nodes:
        if is_region(node):
            yield from held_linears(graph, node)
        elif (spelled := spelled_linear(graph, node)) is not None:
            weight = None if isinstance(spelled.weight, Attribute) else graph.weight_parameter(spelled.weight)
            owner = graph.parameter_name(weight).rpartition(".")[0] if weight is not None else ""
            yield HeldLinear(owner or graph.fqn(node), weight)


def is_transparent(graph: CapturedGraph, region: Node) -> bool:
    """True for a region that computes, at inference, just what its graph computes."""
    if region_name(region) not in TRANSPARENT:
        return False
    graphs = _graphs(graph, region)
    if len(graphs) != 1 or any(reader.target is not operator.getitem for reader in _readers(graphs, region)):
        return False
    ((holder, module),) = graphs.items()
    if len(region.args) - region.args.index(holder) - 1 - _texts(region, holder) != len(
        _placeholders(module)
    ):
        return False
    if region_name(region) == GRADIENTS:
        return not inside_transforms(module.graph.nodes)
    return region_name(region) != AUTOCAST or _casts_nothing(_inner(graph, region, module)[0])


def _readers(graphs: Mapping[Node, GraphModule], region: Node) -> list[Node]:
    """The readers of a region with several results."""
    (module,) = graphs.values()
    return [] if isinstance(module.graph.output_node().args[0], Node) else list(region.users)


def _texts(region: Node, holder: Node) -> int:
    """How many arguments behind the graph are names of it, no operands."""
    return sum(isinstance(argument, str) for argument in region.args[region.args.index(holder) + 1 :])


def _casts_nothing(inner: CapturedGraph) -> bool:
    """True where each call gives the recorded dtype without autocast too."""
    for node in inner.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        try:
            value = inner.evaluate(node.target, node.args, node.kwargs)
        except Exception:
            return False
        if _dtypes(value) != _dtypes(inner.value(node)):
            return False
    return True


def _dtypes(value: Any) -> list[Any]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each.dtype for each in values if isinstance(each, Tensor)]


def inline(graph: CapturedGraph, region: Node) -> None:
    """Puts the calls of a transparent region's graph in its place."""
    ((holder, module),) = _graphs(graph, region).items()
    behind = [given for given in region.args[region.args.index(holder) + 1 :] if not isinstance(given, str)]
    made: dict[Node, Any] = dict(zip(_placeholders(module), behind, strict=True))
    with graph.graph.inserting_before(region):
        for node in module.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            made[node] = graph.graph.node_copy(node, made.__getitem__)
            if node.op in ("get_attr", "call_module"):
                made[node].target = f"{holder.target}.{node.target}"
    result = map_arg(module.graph.output_node().args[0], made.__getitem__)
    if isinstance(result, Node):
        region.replace_all_uses_with(result)
    else:
        for reader in list(region.users):
            chosen = result[reader.args[1]]  # type: ignore[index]
            assert isinstance(chosen, Node), "a region gives back values that it computes"
            graph.replace(reader, chosen)
    graph.graph.erase_node(region)
    if not holder.users:
        graph.graph.erase_node(holder)
