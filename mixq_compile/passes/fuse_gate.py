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
from mixq_compile.ir.captured_calls import captured_argument
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.operands import operands, operands_for, producer
from mixq_compile.passes._kernel_queries import why_only_reference
from mixq_compile.passes._obstacles import Obstacle, no_place_for_operands, other_readers
from mixq_compile.pipeline import Decision, Pass, PassContext

aten, mixq = torch.ops.aten, torch.ops.mixq
ACTIVATED = mixq.activated_linear.default

MULTIPLY = (operator.mul, torch.mul, "mul", aten.mul.Tensor)
CHUNK = (torch.chunk, "chunk", aten.chunk.default)


@dataclass(frozen=True)
class Gate:
    """The nodes of one gated product."""

    product: Node
    halves: tuple[Node, Node]
    """The gates and the values."""
    activated: Node
    multiplied: Node
    function: str

    @property
    def chunks(self) -> tuple[Node, ...]:
        """The call that cut the product in halves, once; empty where each half is a slice of its own."""
        found = {producer(half): None for half in self.halves}
        return tuple(node for node in found if node is not None)


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
            if isinstance(found, Gate):
                found = self._why_not(graph, found) or found
            if isinstance(found, Obstacle):
                yield Decision.skipped(node, found.reason, details=found.details)
                continue
            fqn = Annotations(found.product).fqn
            yield Decision.applied(
                found.product, f"{found.function} of the gates and their product go into the kernel", fqn=fqn
            )
            _fuse(graph, found)

    def _why_not(self, graph: CapturedGraph, gate: Gate) -> Obstacle | None:
        if self.when == "never":
            return Obstacle("turned off")
        obstacle = no_place_for_operands(ACTIVATED, gate.product)
        obstacle = obstacle or other_readers("the product", [gate.product], {*gate.halves, *gate.chunks})
        if obstacle is not None:
            return obstacle
        within = {gate.activated, gate.multiplied}
        obstacle = other_readers("the gates or the values", [*gate.halves, gate.activated], within)
        if obstacle is not None or self.when == "always":
            return obstacle
        reason = why_only_reference(graph, gate.product, ACTIVATED)
        return Obstacle(reason) if reason is not None else None


def gate_of(graph: CapturedGraph, activated: Node, multiplied: Node) -> Gate | Obstacle:
    """The gated product that a multiplication ends, or why it is none."""
    function = activation_function(activated)
    factors = [captured_argument(multiplied, place, name) for place, name in enumerate(("input", "other"))]
    if function is None or activated not in factors:
        return Obstacle("an activation function that no kernel has")
    factors.remove(activated)
    gates, values = captured_argument(activated, 0, "input"), factors[0]
    halves = _half_of(graph, gates), _half_of(graph, values)
    if halves[0] is None or halves[1] is None or halves[0][0] is not halves[1][0]:
        parts = [node for node in (gates, values) if isinstance(node, Node)]
        return Obstacle.of("gates and values are not the halves of one product", parts)
    if (halves[0][1], halves[1][1]) != (0, 1):
        return Obstacle.of("the gates are not the first half of the product", [gates])
    return Gate(halves[0][0], (gates, values), activated, multiplied, function)


def _half_of(graph: CapturedGraph, node: Any) -> tuple[Node, int] | None:
    """The `mixed_linear` of which a node is a half, and which; None for any other node."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target is operator.getitem:
        chunked, place = producer(node), captured_argument(node, 1, "index")
        if chunked is None or chunked.target not in CHUNK or len(chunked.users) != 2:
            return None
        product, parts = captured_argument(chunked, 0, "input"), captured_argument(chunked, 1, "chunks")
        dimension, whole = captured_argument(chunked, 2, "dim", 0), _product(graph, product)
        if whole is None or parts != 2 or dimension not in (-1, whole.dim() - 1):
            return None
        return product, int(place)
    if node.target is not aten.slice.Tensor:
        return None
    cut = operands(node)
    whole = _product(graph, cut["self"])
    if whole is None or cut["dim"] not in (-1, whole.dim() - 1) or cut["step"] != 1:
        return None
    width = int(whole.shape[-1])
    places: dict[Any, int] = {(0, width // 2): 0, (width // 2, width): 1}
    half = places.get((cut["start"], cut["end"])) if width % 2 == 0 else None
    return None if half is None else (cut["self"], half)


def _product(graph: CapturedGraph, node: Any) -> Tensor | None:
    """The value of a `mixed_linear`; None for any other node."""
    is_product = isinstance(node, Node) and node.target is mixq.mixed_linear.default
    return graph.value(node) if is_product else None


def _fuse(graph: CapturedGraph, gate: Gate) -> None:
    taken = {**operands_for(ACTIVATED, gate.product), "function": gate.function, "gated": True}
    with graph.graph.inserting_before(gate.product):
        fused = graph.call(ACTIVATED, taken, like=gate.product)
    graph.replace(gate.multiplied, fused)
    graph.graph.erase_node(gate.activated)
    for node in (*gate.halves, *gate.chunks, gate.product):
        graph.graph.erase_node(node)
