"""`canonicalize-linear`: every spelling of a linear becomes `aten.linear.default`, named and with a role."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import Node

from mixq_compile.ir.annotations import annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.linears import transposed_source
from mixq_compile.ir.roles import ROUTER, role_of
from mixq_compile.pipeline import Decision, Pass, PassContext

aten = torch.ops.aten
LINEARS = (torch.nn.functional.linear, torch._C._nn.linear, aten.linear.default)
ADDMMS = (torch.addmm, aten.addmm.default, "addmm")
PRODUCTS = (torch.matmul, torch.mm, operator.matmul, aten.mm.default, aten.matmul.default, "matmul", "mm")
ADDITIONS = (operator.add, torch.add, aten.add.Tensor, operator.iadd, "add")
UNSUPPORTED = {"grouped_mm": "unsupported: grouped (one product for several experts)"}


@dataclass(frozen=True)
class _Linear:
    """What a matched node computes: `x · weightᵀ + bias`; `swapped`: the parameter is [K, N]."""

    x: Node
    weight: Node
    bias: Node | None
    swapped: bool
    replaces: Node
    """The node whose value the linear is: the product, or the addition of its bias."""


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _is_parameter(graph: CapturedGraph, node: Any, dims: int) -> bool:
    tensor = graph.tensor(node) if isinstance(node, Node) else None
    return tensor is not None and tensor.dim() == dims and tensor.is_floating_point()


def _bias_addition(graph: CapturedGraph, product: Node, out_features: int) -> tuple[Node, Node] | None:
    """The only reader of a product if it adds a bias parameter, and that bias."""
    if len(product.users) != 1:
        return None
    (reader,) = product.users
    if reader.target not in ADDITIONS or len(reader.args) != 2 or reader.kwargs:
        return None
    other = reader.args[1] if reader.args[0] is product else reader.args[0]
    if not _is_parameter(graph, other, dims=1) or graph.tensor(other).shape[0] != out_features:  # type: ignore[arg-type,union-attr]
        return None
    return reader, other  # type: ignore[return-value]


def _match_module(graph: CapturedGraph, node: Node) -> _Linear | None:
    module = graph.module.get_submodule(str(node.target))
    if type(module) is not nn.Linear:
        return None
    with graph.graph.inserting_before(node):
        weight = graph.attach(f"{node.target}.weight", module.weight)
        bias = graph.attach(f"{node.target}.bias", module.bias) if module.bias is not None else None
    return _Linear(node.args[0], weight, bias, False, node)  # type: ignore[arg-type]


def _match_addmm(graph: CapturedGraph, node: Node) -> _Linear | None:
    bias, x, matrix = (_argument(node, place, name) for place, name in enumerate(("input", "mat1", "mat2")))
    scaled = node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1
    if scaled or not _is_parameter(graph, bias, dims=1):
        return None
    source = transposed_source(matrix)
    if source is not None and _is_parameter(graph, source, dims=2):
        return _Linear(x, source, bias, False, node)
    if _is_parameter(graph, matrix, dims=2):
        return _Linear(x, matrix, bias, True, node)
    return None


def _match_product(graph: CapturedGraph, node: Node) -> _Linear | None:
    x, matrix = _argument(node, 0, "input"), _argument(node, 1, "other")
    if not isinstance(x, Node) or not isinstance(matrix, Node):
        return None
    source = transposed_source(matrix)
    weight, swapped = (source, False) if source is not None else (matrix, True)
    if not _is_parameter(graph, weight, dims=2):
        return None
    out_features = graph.tensor(weight).shape[1 if swapped else 0]  # type: ignore[arg-type,union-attr]
    addition = _bias_addition(graph, node, out_features)
    replaces, bias = addition if addition else (node, None)
    return _Linear(x, weight, bias, swapped, replaces)  # type: ignore[arg-type]


def _match(graph: CapturedGraph, node: Node) -> _Linear | None:
    if node.op == "call_module":
        return _match_module(graph, node)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in LINEARS:
        x, weight = _argument(node, 0, "input"), _argument(node, 1, "weight")
        return _Linear(x, weight, _argument(node, 2, "bias"), False, node)
    if node.target in ADDMMS:
        return _match_addmm(graph, node)
    if node.target in PRODUCTS:
        return _match_product(graph, node)
    return None


@dataclass(frozen=True)
class CanonicalizeLinear(Pass):
    """Rewrites each linear to `aten.linear.default` and annotates it with its name and role."""

    name: ClassVar[str] = "canonicalize-linear"
    establishes: ClassVar[frozenset[str]] = frozenset({"canonical-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each linear, and one for each product that is known but not supported."""
        for node in list(graph.graph.nodes):
            reason = next((text for key, text in UNSUPPORTED.items() if key in str(node.target)), None)
            if reason is not None:
                yield Decision.skipped(node, reason, fqn=graph.fqn(node))
                continue
            found = _match(graph, node)
            if found is None:
                continue
            fqn = graph.fqn(node) or graph.parameter_name(found.weight).removesuffix(".weight")
            spelled = getattr(node.target, "__name__", str(node.target))
            yield Decision.applied(node, f"{spelled} is a linear", fqn=fqn)
            linear = self._rewrite(graph, node, found)
            view = annotations(linear)
            view.fqn = fqn
            view.role = role_of(fqn) if self._is_owned(graph, node) else ROUTER

    def _is_owned(self, graph: CapturedGraph, node: Node) -> bool:
        """True where a linear module makes this call; a router multiplies by a parameter of its own."""
        return node.op == "call_module" or graph.owner_is_linear(node)

    def _rewrite(self, graph: CapturedGraph, node: Node, found: _Linear) -> Node:
        with graph.graph.inserting_before(found.replaces):
            weight = found.weight
            if found.swapped:
                weight = graph.call(aten.t.default, (weight,), like=node)
            linear = graph.call(aten.linear.default, (found.x, weight, found.bias), like=node)
        found.replaces.replace_all_uses_with(linear)
        graph.graph.erase_node(found.replaces)
        if found.replaces is not node and not node.users:
            graph.graph.erase_node(node)
        return linear
