"""`fuse-activation`: linear → GELU or ReLU → quantize between two linears becomes one `quantized_linear`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops import providers
from mixq_compile.pipeline import Decision, Pass, PassContext

aten, mixq = torch.ops.aten, torch.ops.mixq
GELUS = (torch.nn.functional.gelu, aten.gelu.default)
RELUS = (torch.relu, torch.nn.functional.relu, aten.relu.default)


def activation_of(node: Node) -> str | None:
    """Which function of a linear's result a node is, as the operator names it; None for any other."""
    if node.target in GELUS:
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return "gelu" if approximate == "none" else None
    if node.target in RELUS and not node.kwargs.get("inplace", False):
        return "relu"
    return None


def _arguments(node: Node) -> tuple[Any, ...]:
    return tuple(node.args)


@dataclass(frozen=True)
class FuseActivation(Pass):
    """Keeps the value between two linears, such as a feed-forward's, out of memory where a kernel can."""

    name: ClassVar[str] = "fuse-activation"
    requires: ClassVar[frozenset[str]] = frozenset({"fused-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each activation function of a quantized linear."""
        for node in graph.walk(*GELUS, *RELUS):
            activation = activation_of(node)
            linear = node.args[0]
            if (
                activation is None
                or not isinstance(linear, Node)
                or linear.target is not mixq.mixed_linear.default
            ):
                continue
            quantized = next(
                (user for user in node.users if user.target is mixq.quantize_online.default), None
            )
            fqn = Annotations(linear).fqn
            reason = self._why_not(graph, node, linear, quantized)
            if reason is not None or quantized is None:
                yield Decision.skipped(node, reason or "no linear reads it quantized", fqn=fqn)
                continue
            yield Decision.applied(
                node, f"{activation} and the next quantization go into the linear", fqn=fqn
            )
            self._fuse(graph, node, linear, quantized, activation)

    def _why_not(self, graph: CapturedGraph, node: Node, linear: Node, quantized: Node | None) -> str | None:
        if quantized is None:
            return "no linear reads it quantized"
        if len(linear.users) > 1:
            return "something else reads the linear's result"
        readers = [user for user in node.users if user is not quantized]
        if any(user.target is not mixq.mixed_linear.default or user.args[0] is not node for user in readers):
            return "something else reads its result"
        if any(_arguments(user)[-2] for user in (linear, quantized, *readers)):
            return "calls with few rows need the value itself"
        _, _, _, outliers, _, weight_codes, *_ = _arguments(linear)
        value, weight = graph.value(outliers), graph.value(weight_codes)
        bits = 4 if weight.dtype == torch.uint8 else 8
        query = providers.KernelQuery("quantized_linear", value.device, value.dtype, bits)
        chosen, _ = providers.rejections(query)
        if chosen is None or chosen.name == "ref":
            return f"no kernel does both on {value.device.type}"
        return None

    def _fuse(self, graph: CapturedGraph, node: Node, linear: Node, quantized: Node, activation: str) -> None:
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
