"""`canonicalize-linear`: every spelling of a linear becomes `aten.linear.default`, named and with a role."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.captured_calls import captured_argument
from mixq_compile.ir.effects import is_region
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.roles import OTHER, ROUTER, role_of
from mixq_compile.pipeline import Decision, Pass, PassContext

aten = torch.ops.aten
LINEARS = (torch.nn.functional.linear, torch._C._nn.linear, aten.linear.default)
ADDMMS = (torch.addmm, aten.addmm.default, "addmm")
PRODUCTS = (torch.matmul, torch.mm, operator.matmul, aten.mm.default, aten.matmul.default, "matmul", "mm")
ADDITIONS = (operator.add, torch.add, aten.add.Tensor, operator.iadd, aten.add_.Tensor, "add", "add_")
GROUPED = "unsupported: grouped (one product for several experts)"
UNSUPPORTED = {"grouped_mm": GROUPED}
MIXED_TYPES = "its input, weight and result differ in dtype, as under autocast: cast the model itself instead"


@dataclass(frozen=True)
class _Attribute:
    """A tensor of the graph module, by its dotted name."""

    name: str
    tensor: Tensor


@dataclass(frozen=True)
class _Linear:
    """What a matched node computes: `x · weightᵀ + bias`; `swapped`: the parameter is [K, N].

    Weight and bias are nodes, or attributes of the module that no node reads yet.
    """

    x: Node
    weight: Node | _Attribute
    bias: Node | _Attribute | None
    swapped: bool
    replaces: Node
    """The node whose value the linear is: the product, or the addition of its bias."""


def _is_parameter(graph: CapturedGraph, node: Any, dims: int) -> bool:
    tensor = graph.tensor(node) if isinstance(node, Node) else None
    return tensor is not None and tensor.dim() == dims and tensor.is_floating_point()


def _bias_addition(graph: CapturedGraph, product: Node, weight: Tensor, out_features: int) -> Node | None:
    """The only reader of a product if it adds a bias parameter, in the product's dtype."""
    if len(product.users) != 1:
        return None
    (reader,) = product.users
    terms = _terms(reader)
    if reader.target not in ADDITIONS or terms is None:
        return None
    bias = graph.tensor(_added(reader, product))
    if bias is None or bias.shape != (out_features,) or bias.dtype != weight.dtype:
        return None
    return reader


def _terms(addition: Node) -> tuple[Any, Any] | None:
    """The terms of `first + second`; None for a call that is given anything else, such as a factor."""
    return addition.args if len(addition.args) == 2 and not addition.kwargs else None  # type: ignore[return-value]


def _added(addition: Node, product: Node) -> Any:
    first, second = _terms(addition) or (None, None)
    return second if first is product else first


def _match_module(graph: CapturedGraph, node: Node) -> _Linear | None:
    module = graph.module.get_submodule(str(node.target))
    if type(module) is not nn.Linear:
        return None
    weight = _Attribute(f"{node.target}.weight", module.weight)
    bias = _Attribute(f"{node.target}.bias", module.bias) if module.bias is not None else None
    return _Linear(captured_argument(node, 0, "input"), weight, bias, False, node)


def _match_addmm(graph: CapturedGraph, node: Node) -> _Linear | None:
    bias, x, matrix = (
        captured_argument(node, place, name) for place, name in enumerate(("input", "mat1", "mat2"))
    )
    scaled = node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1
    weight = graph.weight_parameter(matrix)
    if scaled or weight is None or not _is_parameter(graph, bias, dims=1):
        return None
    return _Linear(x, weight, bias, weight is matrix, node)


def _match_product(graph: CapturedGraph, node: Node) -> _Linear | None:
    x, matrix = captured_argument(node, 0, "input"), captured_argument(node, 1, "other")
    weight = graph.weight_parameter(matrix)
    tensor = graph.tensor(weight)
    is_activation = isinstance(x, Node) and graph.weight_parameter(x) is None
    if not is_activation or weight is None or tensor is None or not _is_parameter(graph, weight, dims=2):
        return None
    swapped = weight is matrix
    addition = _bias_addition(graph, node, tensor, tensor.shape[1 if swapped else 0])
    if addition is None:
        return _Linear(x, weight, None, swapped, node)
    return _Linear(x, weight, _added(addition, node), swapped, addition)


def _match(graph: CapturedGraph, node: Node) -> _Linear | None:
    if node.op == "call_module":
        return _match_module(graph, node)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in LINEARS:
        x, weight = captured_argument(node, 0, "input"), captured_argument(node, 1, "weight")
        return _Linear(x, weight, captured_argument(node, 2, "bias"), False, node)
    if node.target in ADDMMS:
        return _match_addmm(graph, node)
    if node.target in PRODUCTS:
        return _match_product(graph, node)
    return None


def _parameter_behind(graph: CapturedGraph, node: Any) -> Node | None:
    """The parameter that an operand is, or was made of along first arguments."""
    while isinstance(node, Node):
        if graph.tensor(node) is not None:
            return node
        node = captured_argument(node, 0, "input")
    return None


def _is_mixed(graph: CapturedGraph, found: _Linear) -> bool:
    """True where the recorded values of input, weight and result have not all one dtype."""
    operands = (found.x, found.weight, found.replaces)
    values = (each.tensor if isinstance(each, _Attribute) else graph.value(each) for each in operands)
    return len({value.dtype for value in values if isinstance(value, Tensor)}) > 1


@dataclass(frozen=True)
class CanonicalizeLinear(Pass):
    """Rewrites each linear to `aten.linear.default` and annotates it with its name and role."""

    name: ClassVar[str] = "canonicalize-linear"
    establishes: ClassVar[frozenset[str]] = frozenset({"canonical-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each linear, and one for each product that is known but not supported."""
        for node in graph.walk():
            if Annotations(node).role is not None:
                continue
            if is_region(node):
                yield Decision.skipped(node, f"{node.target}: what is inside is not looked at")
                continue
            reason = next((text for key, text in UNSUPPORTED.items() if key in str(node.target)), None)
            if reason is not None:
                parameter = _parameter_behind(graph, captured_argument(node, 1, "mat2"))
                fqn = graph.parameter_name(parameter) if parameter is not None else graph.fqn(node)
                yield Decision.skipped(node, reason, fqn=fqn)
                view = Annotations(node)
                view.fqn, view.role, view.skip = fqn, OTHER, reason
                view.readers = [parameter.name] if parameter is not None else None
                continue
            found = _match(graph, node)
            if found is None:
                continue
            fqn = graph.fqn(node) or self._parameter_owner(graph, found)
            if _is_mixed(graph, found):
                yield Decision.skipped(node, MIXED_TYPES, fqn=fqn)
                view = Annotations(node)
                view.fqn, view.role, view.skip = fqn, role_of(fqn), MIXED_TYPES
                # The attribute of a module that stays a call has no node that could be named.
                parameter = found.weight if isinstance(found.weight, Node) else None
                if parameter is not None and graph.tensor(parameter) is not None:
                    view.readers = [parameter.name]
                continue
            # A router multiplies by a parameter of its own; only a linear module's product is a linear.
            owned = node.op == "call_module" or graph.owner_is_linear(node)
            role = role_of(fqn) if owned else ROUTER
            spelled = getattr(node.target, "__name__", str(node.target))
            yield Decision.applied(node, f"{spelled} is a linear, its role {role}", fqn=fqn)
            is_canonical = node.target is aten.linear.default and not node.kwargs
            linear = node if is_canonical else self._rewrite(graph, node, found)
            view = Annotations(linear)
            view.fqn, view.role = fqn, role

    def _parameter_owner(self, graph: CapturedGraph, found: _Linear) -> str:
        if isinstance(found.weight, _Attribute):
            return found.weight.name.removesuffix(".weight")
        parameter = _parameter_behind(graph, found.weight)
        return "" if parameter is None else graph.parameter_name(parameter).removesuffix(".weight")

    def _node(self, graph: CapturedGraph, operand: Node | _Attribute | None) -> Node | None:
        if isinstance(operand, _Attribute):
            return graph.attach(operand.name, operand.tensor)
        return operand

    def _rewrite(self, graph: CapturedGraph, node: Node, found: _Linear) -> Node:
        weight, bias = (self._node(graph, each) for each in (found.weight, found.bias))
        with graph.graph.inserting_before(found.replaces):
            if found.swapped:
                weight = graph.call(aten.t.default, (weight,), like=node)
            taken = {"input": found.x, "weight": weight, "bias": bias}
            linear = graph.call(aten.linear.default, taken, like=node)
        graph.replace(found.replaces, linear)
        if found.replaces is not node:
            graph.graph.erase_node(node)
        return linear
