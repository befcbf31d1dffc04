"""`fuse-activation`: the activation function between two linears goes into the kernel of the first.

Together with the next quantization where a kernel does all three (`quantized_linear`), else alone
(`activated_linear`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.activation_functions import ACTIVATIONS, activation_function
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops import providers
from mixq_compile.ops.weight_codes import weight_bits
from mixq_compile.passes.fuse_gate import why_no_kernel
from mixq_compile.pipeline import Decision, Pass, PassContext

aten, mixq = torch.ops.aten, torch.ops.mixq
QUANTIZING = ("gelu", "relu")
"""Functions that `quantized_linear` has."""
QUANTIZES = (mixq.quantize_online.default, mixq.quantize.default)


def _arguments(node: Node) -> tuple[Any, ...]:
    return tuple(node.args)


@dataclass(frozen=True)
class FuseActivation(Pass):
    """Keeps the value between two linears, such as a feed-forward's, out of memory where a kernel can."""

    name: ClassVar[str] = "fuse-activation"
    requires: ClassVar[frozenset[str]] = frozenset({"fused-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each activation function of a quantized linear."""
        for node in graph.walk(*ACTIVATIONS):
            activation = activation_function(node)
            linear = node.args[0]
            if (
                activation is None
                or not isinstance(linear, Node)
                or linear.target is not mixq.mixed_linear.default
            ):
                continue
            quantized = next((user for user in node.users if user.target in QUANTIZES), None)
            fqn = Annotations(linear).fqn
            if quantized is None or len(linear.users) > 1:
                read_too = "something else reads the linear's result"
                yield Decision.skipped(
                    node, read_too if quantized else "no linear reads it quantized", fqn=fqn
                )
            elif (reason := _why_not_quantized(graph, node, linear, quantized, activation)) is None:
                what = f"{activation} and the next quantization go into the linear"
                yield Decision.applied(node, what, fqn=fqn)
                _fuse_with_quantization(graph, node, linear, quantized, activation)
            elif why_no_kernel(graph, linear) is None:
                what = f"{activation} goes into the linear; the quantization stays: {reason}"
                yield Decision.applied(node, what, fqn=fqn)
                _fuse_alone(graph, node, linear, activation)
            else:
                yield Decision.skipped(node, reason, fqn=fqn)


def _why_not_quantized(
    graph: CapturedGraph, node: Node, linear: Node, quantized: Node, activation: str
) -> str | None:
    """Why the quantization of the function's value stays outside of the linear; None for no reason."""
    readers = [user for user in node.users if user is not quantized]
    if any(user.target is not mixq.mixed_linear.default or user.args[0] is not node for user in readers):
        return "something else reads its result"
    if any(_arguments(user)[-2] for user in (linear, quantized, *readers)):
        return "calls with few rows need the value itself"
    _, _, _, outliers, _, weight_codes, *_ = _arguments(linear)
    value, weight = graph.value(outliers), graph.value(weight_codes)
    query = providers.KernelQuery("quantized_linear", value.device, value.dtype, weight_bits(weight))
    chosen, _ = providers.rejections(query)
    learns = quantized.target is mixq.quantize_online.default
    if chosen is None or chosen.name == "ref" or activation not in QUANTIZING or not learns:
        return f"no kernel does both on {value.device.type}"
    return None


def _fuse_alone(graph: CapturedGraph, node: Node, linear: Node, activation: str) -> None:
    operands, switch = linear.args[:-2], linear.args[-2:]
    with graph.graph.inserting_before(linear):
        arguments = (*operands, activation, False, *switch)
        fused = graph.call(mixq.activated_linear.default, arguments, like=linear)
    graph.replace(node, fused)
    graph.graph.erase_node(linear)


def _fuse_with_quantization(
    graph: CapturedGraph, node: Node, linear: Node, quantized: Node, activation: str
) -> None:
    _, codes, scale, outliers, count, weight_codes, weight_scale, outlier_weight, bias, _, _ = _arguments(
        linear
    )
    _, *state, bits, miss, _, kernel = _arguments(quantized)
    with graph.graph.inserting_before(quantized):
        fused = graph.call(
            mixq.quantized_linear.default,
            (
                codes,
                *state,
                scale,
                outliers,
                count,
                weight_codes,
                weight_scale,
                outlier_weight,
                bias,
                activation,
                bits,
                miss,
                kernel,
            ),
            like=linear,
        )
    quantized.replace_all_uses_with(fused)
    graph.graph.erase_node(quantized)
    places = {item.args[1]: item for item in fused.users}
    for reader in list(node.users):
        # Without a weight-only path x gives no more than its dtype, which the outliers have too.
        reader.args = (places[2], *reader.args[1:])
    graph.graph.erase_node(node)
    graph.graph.erase_node(linear)
