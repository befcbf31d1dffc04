"""`expand-linear`: the `mixq::linear` of a MixqLinear becomes its parts, so that passes see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.annotations import annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.roles import role_of
from mixq_compile.ir.shapes import row_count
from mixq_compile.ops import providers
from mixq_compile.ops.linear import small_batch_limit_of
from mixq_compile.pipeline import Decision, Pass, PassContext

mixq = torch.ops.mixq


@dataclass(frozen=True)
class ExpandLinear(Pass):
    """Expands each `mixq::linear` into quantize, refresh, mixed_gemm and dequantize."""

    name: ClassVar[str] = "expand-linear"
    establishes: ClassVar[frozenset[str]] = frozenset({"mixed-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each `mixq::linear`."""
        for node in list(graph.graph.nodes):
            if node.target is not mixq.linear.default:
                continue
            fqn = graph.fqn(node)
            yield Decision.applied(node, "expanded into its parts", fqn=fqn)
            with graph.graph.inserting_before(node):
                result = self._expand(graph, node, fqn)
            node.replace_all_uses_with(result)
            graph.graph.erase_node(node)

    def _expand(self, graph: CapturedGraph, node: Node, fqn: str) -> Node:
        (
            x, weight_codes, weight_scale, bias, index, column_slot, column_max, counters,
            effective_threshold, cached_index, outlier_weight, original, bits, threshold, batch_invariant, miss,
        ) = node.args  # fmt: skip

        def call(op: Any, *args: Any) -> Node:
            made = graph.call(op, args, like=node)
            annotations(made).fqn, annotations(made).role = fqn, role_of(fqn)
            return made

        small_m = small_batch_limit_of(graph.value(x), graph.value(weight_codes), batch_invariant)
        fixed, _ = row_count(graph.value(x))
        if bits == 16 or (fixed is not None and fixed <= small_m):
            return call(mixq.weight_only_linear.default, x, weight_codes, weight_scale, bias, providers.AUTO)
        tail = (small_m, providers.AUTO)
        count: Any = counters
        slots = graph.value(index).shape[0]
        if miss == "static" or slots == 0:
            quantized = call(mixq.quantize.default, x, index, column_slot, counters, bits, *tail)
            codes, scale, outliers = (graph.getitem(quantized, place) for place in range(3))
        else:
            quantized = call(
                mixq.quantize_online.default, x, index, column_slot, column_max, counters,
                effective_threshold, bits, miss, *tail,
            )  # fmt: skip
            codes, scale, outliers, count = (graph.getitem(quantized, place) for place in range(4))
        view = annotations(quantized)
        view.parameters = {"outliers": {"threshold": str(threshold), "capacity": slots, "miss": miss}}
        if miss in ("static", "frozen"):
            view.outlier_columns = graph.tensor(index).tolist()
        if slots:
            call(
                mixq.refresh_outlier_weights.default, codes, index, count, [cached_index],
                [outlier_weight], [weight_codes], [weight_scale], [original], *tail,
            )  # fmt: skip
        product = call(
            mixq.mixed_gemm.default, codes, outliers, count, weight_codes, outlier_weight, providers.AUTO
        )
        accumulator, outlier_product = (graph.getitem(product, place) for place in range(2))
        return call(
            mixq.dequantize.default,
            x,
            accumulator,
            outlier_product,
            scale,
            weight_scale,
            bias,
            providers.AUTO,
        )
