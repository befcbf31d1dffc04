"""`fuse-activation`: the activation function between two linears goes into the kernel of the first.

Together with the next quantization where a kernel does all three (`quantized_linear`), else alone
(`activated_linear`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.activation_functions import ACTIVATIONS, activation_function
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.captured_calls import captured_argument
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.activation_functions import QUANTIZING
from mixq_compile.ops.operands import operand, operands_for, result, set_operands
from mixq_compile.passes._kernel_queries import why_only_reference
from mixq_compile.passes._obstacles import Obstacle, no_place_for_operands, other_readers
from mixq_compile.pipeline import Decision, Pass, PassContext

aten, mixq = torch.ops.aten, torch.ops.mixq
ACTIVATED, QUANTIZED = mixq.activated_linear.default, mixq.quantized_linear.default
QUANTIZES = (mixq.quantize_online.default, mixq.quantize.default)


@dataclass(frozen=True)
class FuseActivation(Pass):
    """Keeps the value between two linears, such as a feed-forward's, out of memory where a kernel can."""

    name: ClassVar[str] = "fuse-activation"
    requires: ClassVar[frozenset[str]] = frozenset({"fused-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each activation function of a quantized linear."""
        for node in graph.walk(*ACTIVATIONS):
            activation = activation_function(node)
            linear = captured_argument(node, 0, "input")
            if (
                activation is None
                or not isinstance(linear, Node)
                or linear.target is not mixq.mixed_linear.default
            ):
                continue
            quantized = next((user for user in node.users if user.target in QUANTIZES), None)
            fqn = Annotations(linear).fqn
            if quantized is None:
                yield Decision.skipped(node, "no linear reads it quantized", fqn=fqn)
            elif (obstacle := other_readers("the linear's result", [linear], {node})) is not None:
                yield Decision.skipped(node, obstacle.reason, fqn=fqn, details=obstacle.details)
            elif (obstacle := _why_not_quantized(graph, node, linear, quantized, activation)) is None:
                what = f"{activation} and the next quantization go into the linear"
                yield Decision.applied(node, what, fqn=fqn)
                _fuse_with_quantization(graph, node, linear, quantized, activation)
            elif (lost := no_place_for_operands(ACTIVATED, linear)) is not None:
                yield Decision.skipped(node, lost.reason, fqn=fqn, details=lost.details)
            elif why_only_reference(graph, linear, ACTIVATED) is None:
                what = f"{activation} goes into the linear; the quantization stays: {obstacle.reason}"
                yield Decision.applied(node, what, fqn=fqn, details=obstacle.details)
                _fuse_alone(graph, node, linear, activation)
            else:
                yield Decision.skipped(node, obstacle.reason, fqn=fqn, details=obstacle.details)


def _why_not_quantized(
    graph: CapturedGraph, node: Node, linear: Node, quantized: Node, activation: str
) -> Obstacle | None:
    """Why the quantization of the function's value stays outside of the linear; None for no reason."""
    readers = [user for user in node.users if user is not quantized]
    linears = [user for user in readers if user.target is mixq.mixed_linear.default]
    following = {user for user in linears if operand(user, "x") is node}
    obstacle = other_readers("its result", [node], {quantized, *following})
    obstacle = obstacle or no_place_for_operands(QUANTIZED, linear, {"x", "small_m"})
    obstacle = obstacle or no_place_for_operands(QUANTIZED, quantized, {"x", "small_m"})
    if obstacle is not None:
        return obstacle
    if few := [user for user in (linear, quantized, *readers) if operand(user, "small_m")]:
        return Obstacle.of("with few rows these need the value itself", few)
    learns = quantized.target is mixq.quantize_online.default
    reason = why_only_reference(graph, linear, QUANTIZED)
    if reason is not None or activation not in QUANTIZING or not learns:
        return Obstacle(f"no kernel does both on {graph.value(operand(linear, 'outliers')).device.type}")
    return None


def _fuse_alone(graph: CapturedGraph, node: Node, linear: Node, activation: str) -> None:
    taken = {**operands_for(ACTIVATED, linear), "function": activation, "gated": False}
    with graph.graph.inserting_before(linear):
        fused = graph.call(ACTIVATED, taken, like=linear)
    graph.replace(node, fused)
    graph.graph.erase_node(linear)


def _fuse_with_quantization(
    graph: CapturedGraph, node: Node, linear: Node, quantized: Node, activation: str
) -> None:
    taken = {
        **operands_for(QUANTIZED, linear),
        **operands_for(QUANTIZED, quantized),
        "function": activation,
    }
    with graph.graph.inserting_before(quantized):
        fused = graph.call(QUANTIZED, taken, like=linear)
    quantized.replace_all_uses_with(fused)
    graph.graph.erase_node(quantized)
    outliers = result(fused, "outliers")
    for reader in list(node.users):
        # Without a weight-only path x gives no more than its dtype, which the outliers have too.
        set_operands(reader, x=outliers)
    graph.graph.erase_node(node)
    graph.graph.erase_node(linear)
