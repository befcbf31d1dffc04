"""`canonicalize-linear`: every spelling of a linear becomes `aten.linear.default`, named and with a role."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.captured_calls import captured_argument
from mixq_compile.ir.effects import inside_transforms, is_region
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.heads import role_by_place
from mixq_compile.ir.linear_spellings import CANONICAL, Attribute, SpelledLinear, spelled_linear
from mixq_compile.ir.linears import features_of
from mixq_compile.ir.regions import AUTOCAST, held_linears, region_name
from mixq_compile.ir.roles import OTHER, ROUTER, role_of
from mixq_compile.pipeline import Decision, Pass, PassContext
from mixq_compile.selection.eligibility import GROUPED

aten = torch.ops.aten
UNSUPPORTED = {"grouped_mm": GROUPED}
MIXED_TYPES = "its input, weight and result differ in dtype, as under autocast: cast the model itself instead"
TRANSFORMED = "it runs inside a transform such as torch.vmap, for which no quantized operator has a rule"


def _parameter_behind(graph: CapturedGraph, node: Any) -> Node | None:
    """The parameter that an operand is, or was made of along first arguments."""
    while isinstance(node, Node):
        if graph.tensor(node) is not None:
            return node
        node = captured_argument(node, 0, "input")
    return None


def _is_mixed(graph: CapturedGraph, found: SpelledLinear) -> bool:
    """True where the recorded values of input, weight and result have not all one dtype."""
    operands = (found.x, found.weight, found.replaces)
    values = (each.tensor if isinstance(each, Attribute) else graph.value(each) for each in operands)
    return len({value.dtype for value in values if isinstance(value, Tensor)}) > 1


@dataclass(frozen=True)
class CanonicalizeLinear(Pass):
    """Rewrites each linear to `aten.linear.default` and annotates it with its name and role."""

    name: ClassVar[str] = "canonicalize-linear"
    establishes: ClassVar[frozenset[str]] = frozenset({"canonical-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each linear, and one for each product that is known but not supported."""
        transformed = inside_transforms(graph.graph.nodes)
        for node in graph.walk():
            if Annotations(node).role is not None or Annotations(node).members is not None:
                continue
            if is_region(node):
                yield from self._held(graph, node)
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
            found = spelled_linear(graph, node)
            if found is None:
                continue
            fqn = graph.fqn(node) or self._parameter_owner(graph, found)
            left = TRANSFORMED if node in transformed else MIXED_TYPES if _is_mixed(graph, found) else None
            if left is not None:
                yield Decision.skipped(node, left, fqn=fqn)
                view = Annotations(node)
                view.fqn, view.role, view.skip = fqn, role_of(fqn), left
                # The attribute of a module that stays a call has no node that could be named.
                parameter = found.weight if isinstance(found.weight, Node) else None
                if parameter is not None and graph.tensor(parameter) is not None:
                    view.readers = [parameter.name]
                continue
            role = self._role(graph, node, found, fqn)
            spelled = getattr(node.target, "__name__", str(node.target))
            yield Decision.applied(node, f"{spelled} is a linear, its role {role}", fqn=fqn)
            is_canonical = node.target is CANONICAL and not node.kwargs
            linear = node if is_canonical else self._rewrite(graph, node, found)
            view = Annotations(linear)
            view.fqn, view.role = fqn, role

    def _held(self, graph: CapturedGraph, region: Node) -> Iterator[Decision]:
        """One decision for each linear inside of a region, which stays, and a note where it holds none."""
        held, name = held_linears(graph, region), region_name(region)
        reason = MIXED_TYPES if name == AUTOCAST else f"it runs inside {name}, whose graph no pass rewrites"
        for linear in held:
            yield Decision.skipped(region, reason, fqn=linear.fqn)
        if not held:
            yield Decision.noted(region, f"{name} holds no linear")
        Annotations(region).members = [
            {
                "fqn": linear.fqn,
                "role": role_of(linear.fqn),
                "skip": reason,
                "readers": [linear.weight.name] if linear.weight is not None else [],
            }
            for linear in held
        ] or None

    def _role(self, graph: CapturedGraph, node: Node, found: SpelledLinear, fqn: str) -> str:
        # A router multiplies by a parameter of its own; only a linear module's product is a linear.
        if node.op != "call_module" and not graph.owner_is_linear(node):
            return ROUTER
        weight = found.weight.tensor if isinstance(found.weight, Attribute) else graph.value(found.weight)
        result = graph.value(found.replaces)
        if weight is None or result is None:
            return role_of(fqn)
        features = features_of(weight.shape, result.shape)
        return role_by_place(graph, found.replaces, fqn, role_of(fqn, features), features)

    def _parameter_owner(self, graph: CapturedGraph, found: SpelledLinear) -> str:
        if isinstance(found.weight, Attribute):
            return found.weight.name.removesuffix(".weight")
        parameter = _parameter_behind(graph, found.weight)
        return "" if parameter is None else graph.parameter_name(parameter).removesuffix(".weight")

    def _node(self, graph: CapturedGraph, operand: Node | Attribute | None) -> Node | None:
        if isinstance(operand, Attribute):
            return graph.attach(operand.name, operand.tensor)
        return operand

    def _rewrite(self, graph: CapturedGraph, node: Node, found: SpelledLinear) -> Node:
        weight, bias = (self._node(graph, each) for each in (found.weight, found.bias))
        with graph.graph.inserting_before(found.replaces):
            if found.swapped:
                weight = graph.call(aten.t.default, (weight,), like=node)
            taken = {"input": found.x, "weight": weight, "bias": bias}
            linear = graph.call(CANONICAL, taken, like=node)
        graph.replace(found.replaces, linear)
        if found.replaces is not node:
            graph.graph.erase_node(node)
        return linear
