"""`fuse-gate`: `silu(gates) * values`, the two halves of one product, become part of the product's kernel."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.activation_functions import ACTIVATIONS, activation_function
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops import providers
from mixq_compile.ops.weight_codes import weight_bits
from mixq_compile.pipeline import Decision, Pass, PassContext

aten, mixq = torch.ops.aten, torch.ops.mixq

MULTIPLY = (operator.mul, torch.mul, "mul", aten.mul.Tensor)
CHUNK = (torch.chunk, "chunk", aten.chunk.default)


@dataclass(frozen=True)
class Gate:
    """The nodes of one gated product."""

    product: Node
    halves: tuple[Node, Node]
    """The gates and the values."""
    activated: Node
    function: str


@dataclass(frozen=True)
class FuseGate(Pass):
    """Keeps gates and values out of memory: the product's kernel multiplies them, and writes half as much."""

    name: ClassVar[str] = "fuse-gate"
    requires: ClassVar[frozenset[str]] = frozenset({"fused-linears"})

    when: Literal["auto", "always", "never"] = "auto"
    """Where a kernel does both; wherever it is possible, by the slow reference too; or not at all."""

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each activation function that is multiplied by something."""
        for node in graph.walk(*ACTIVATIONS):
            multiplications = [user for user in node.users if user.target in MULTIPLY]
            if len(multiplications) != 1:
                continue
            found = gate_of(graph, node, multiplications[0])
            reason = found if isinstance(found, str) else self._why_not(graph, found)
            if isinstance(found, str) or reason is not None:
                yield Decision.skipped(node, str(reason))
                continue
            fqn = Annotations(found.product).fqn
            yield Decision.applied(
                found.product, f"{found.function} of the gates and their product go into the kernel", fqn=fqn
            )
            _fuse(graph, found, multiplications[0])

    def _why_not(self, graph: CapturedGraph, gate: Gate) -> str | None:
        if self.when == "never":
            return "turned off"
        parts = {*gate.halves, *(half.args[0] for half in gate.halves)}
        if any(user not in parts for user in gate.product.users):
            return "something else reads the product"
        gates, values = gate.halves
        if len(gates.users) > 1 or len(values.users) > 1 or len(gate.activated.users) > 1:
            return "something else reads the gates or the values"
        return None if self.when == "always" else why_no_kernel(graph, gate.product)


def why_no_kernel(graph: CapturedGraph, product: Node) -> str | None:
    """Why no kernel has an activation function in the epilogue of a `mixed_linear`; None where one has."""
    x, weight = graph.value(product.args[0]), graph.value(product.args[5])
    query = providers.KernelQuery("activated_linear", x.device, x.dtype, weight_bits(weight))
    chosen, refused = providers.rejections(query)
    if chosen is not None and chosen.name != "ref":
        return None
    reasons = "".join(f" ({name}: {reason})" for name, reason in refused.items())
    return f"no kernel does both on {x.device.type}{reasons}"


def gate_of(graph: CapturedGraph, activated: Node, multiplied: Node) -> Gate | str:
    """The gated product that a multiplication ends, or why it is none."""
    function = activation_function(activated)
    operands = list(multiplied.args[:2])
    if function is None or activated not in operands:
        return "an activation function that no kernel has"
    operands.remove(activated)
    gates, values = activated.args[0], operands[0] if operands else None
    halves = _half_of(graph, gates), _half_of(graph, values)
    if halves[0] is None or halves[1] is None or halves[0][0] is not halves[1][0]:
        return "gates and values are not the halves of one product"
    if (halves[0][1], halves[1][1]) != (0, 1):
        return "the gates are not the first half of the product"
    return Gate(halves[0][0], (gates, values), activated, function)  # type: ignore[arg-type]


def _half_of(graph: CapturedGraph, node: Any) -> tuple[Node, int] | None:
    """The `mixed_linear` of which a node is a half, and which; None for any other node."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target is operator.getitem:
        chunked, place = node.args
        if not isinstance(chunked, Node) or chunked.target not in CHUNK or len(chunked.users) != 2:
            return None
        product, parts, *dimension = chunked.args
        dimension = dimension or [chunked.kwargs.get("dim", 0)]
        whole = _product(graph, product)
        if whole is None or parts != 2 or dimension[0] not in (-1, whole.dim() - 1):
            return None
        return product, int(place)  # type: ignore[arg-type,return-value]
    if node.target is not aten.slice.Tensor:
        return None
    source, axis, *bounds = node.args[:4]
    whole = _product(graph, source)
    if whole is None or axis not in (-1, whole.dim() - 1):
        return None
    width = int(whole.shape[-1])
    places: dict[Any, int] = {(0, width // 2): 0, (width // 2, width): 1}
    place = places.get(tuple(bounds)) if width % 2 == 0 else None
    return None if place is None else (source, place)  # type: ignore[return-value]


def _product(graph: CapturedGraph, node: Any) -> Tensor | None:
    """The value of a `mixed_linear`; None for any other node."""
    is_product = isinstance(node, Node) and node.target is mixq.mixed_linear.default
    return graph.value(node) if is_product else None


def _fuse(graph: CapturedGraph, gate: Gate, multiplied: Node) -> None:
    operands, switch = gate.product.args[:-2], gate.product.args[-2:]
    with graph.graph.inserting_before(gate.product):
        arguments = (*operands, gate.function, True, *switch)
        fused = graph.call(mixq.activated_linear.default, arguments, like=gate.product)
    graph.replace(multiplied, fused)
    graph.graph.erase_node(gate.activated)
    chunks = {half.args[0]: None for half in gate.halves if half.target is operator.getitem}
    for node in (*gate.halves, *chunks, gate.product):
        graph.graph.erase_node(node)  # type: ignore[arg-type]
