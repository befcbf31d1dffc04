"""`rewrite-mixed-linear`: a linear with a scheme becomes quantize → mixed_gemm → dequantize."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.annotations import annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.linears import transposed_source
from mixq_compile.ir.shapes import row_count
from mixq_compile.ops import providers
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.pipeline import Decision, Pass, PassContext
from mixq_compile.scheme import QuantScheme

mixq = torch.ops.mixq


@dataclass(frozen=True)
class RewriteMixedLinear(Pass):
    """Packs each weight that has a scheme and rewrites its linear; the three steps stay visible."""

    name: ClassVar[str] = "rewrite-mixed-linear"
    requires: ClassVar[frozenset[str]] = frozenset({"schemes"})
    establishes: ClassVar[frozenset[str]] = frozenset({"mixed-linears"})

    originals: bool = True
    """Fetch outlier columns found online from the 16-bit weight; else rebuild them from the codes."""
    batch_invariant: bool = False
    """One kernel for every number of rows."""
    kernel: str = "auto"
    """The provider whose switch point to the weight-only kernel holds."""

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each linear that has a scheme."""
        for node in list(graph.graph.nodes):
            view = annotations(node)
            if node.target is not torch.ops.aten.linear.default or view.parameters is None:
                continue
            scheme = QuantScheme.from_json(view.parameters)
            small_m = self._small_m(graph, node, scheme)
            fixed, _ = row_count(graph.value(node.args[0]))
            weight_only = scheme.activation is None or (fixed is not None and fixed <= small_m)
            kind = "weight-only product" if weight_only else "quantize, mixed_gemm, dequantize"
            yield Decision.applied(node, f"{scheme.name}: {kind}", fqn=view.fqn)
            rewriter = _Rewriter(graph, context, node, scheme, small_m, self.originals)
            with graph.graph.inserting_before(node):
                result = rewriter.weight_only() if weight_only else rewriter.mixed()
            node.replace_all_uses_with(result)
            graph.graph.erase_node(node)

    def _small_m(self, graph: CapturedGraph, node: Node, scheme: QuantScheme) -> int:
        if self.batch_invariant or scheme.activation is None:
            return 0
        x, weight = graph.value(node.args[0]), graph.value(node.args[1])
        out_features, in_features = weight.shape
        query = providers.KernelQuery(
            "mixed_linear", x.device, x.dtype, scheme.weight.bits, in_features, out_features
        )
        if self.kernel == providers.AUTO:
            return providers.small_batch_limit(query)
        chosen = providers.named("mixed_linear", self.kernel)
        return chosen.small_batch(query) if chosen.small_batch else 0


class _Rewriter:
    """Builds the nodes that stand for one linear."""

    def __init__(
        self, graph: CapturedGraph, context: PassContext, node: Node, scheme: QuantScheme, small_m: int,
        originals: bool,
    ) -> None:  # fmt: skip
        self.graph, self.context, self.node, self.scheme = graph, context, node, scheme
        self.small_m = small_m
        self.view = annotations(node)
        self.x: Any = node.args[0]
        self.weight_matrix: Any = node.args[1]
        self.bias: Any = node.args[2] if len(node.args) > 2 else None
        source = transposed_source(self.weight_matrix)
        self.parameter: Node = source if source is not None else self.weight_matrix
        tensor = graph.tensor(self.parameter)
        assert tensor is not None
        self.tensor: Tensor = tensor
        self.view.readers = [self.parameter.name]
        self.packed = context.weights.pack(
            tensor, scheme, dtype=graph.value(self.x).dtype, transposed=source is not None
        )
        self.stem = graph.parameter_name(self.parameter)
        self.originals = originals and not self.packed.released

    def _attach(self, what: str, tensor: Tensor) -> Node:
        return self.graph.attach(f"{self.stem}.{what}", tensor)

    def _call(self, op: Any, *args: Any) -> Node:
        return self.graph.call(op, args, like=self.node)

    def weight_only(self) -> Node:
        codes = self._attach("codes", self.packed.weight_codes)
        scale = self._attach("scale", self.packed.weight_scale)
        op = mixq.weight_only_linear.default
        return self._call(op, self.x, codes, scale, self.bias, providers.AUTO)

    def mixed(self) -> Node:
        packed, scheme = self.packed, self.scheme
        assert scheme.activation is not None
        in_features = self.graph.value(self.x).shape[-1]
        state = self.context.weights.state(
            [self.tensor], scheme, in_features, self.view.outlier_columns, self.view.absmax
        )
        self.context.weights.fill(packed, self.tensor, state)
        weight_codes = self._attach("codes", packed.weight_codes)
        weight_scale = self._attach("scale", packed.weight_scale)
        outlier_weight = self._attach("outlier_weight", packed.outlier_weight)
        buffers = [
            self._attach(name, buffer) for name, buffer in zip(STATE_FIELDS, state.buffers(), strict=True)
        ]
        index, column_slot, _, counters, _ = buffers
        bits, miss = scheme.activation.bits, scheme.outliers.miss if scheme.outliers else "static"
        tail = (self.small_m, providers.AUTO)
        if miss == "static":
            quantized = self._call(mixq.quantize.default, self.x, index, column_slot, counters, bits, *tail)
            codes, scale, outliers = (self.graph.getitem(quantized, place) for place in range(3))
            count = counters
        else:
            quantized = self._call(mixq.quantize_online.default, self.x, *buffers, bits, miss, *tail)
            codes, scale, outliers, count = (self.graph.getitem(quantized, place) for place in range(4))
            original = (
                self.weight_matrix
                if self.originals
                else self._attach("no_original", packed.outlier_weight.new_empty(0))
            )
            self._call(
                mixq.refresh_outlier_weights.default, codes, index, count,
                [self._attach("cached_index", packed.cached_index)], [outlier_weight],
                [weight_codes], [weight_scale], [original], *tail,
            )  # fmt: skip
        product = self._call(
            mixq.mixed_gemm.default, codes, outliers, count, weight_codes, outlier_weight, providers.AUTO
        )
        accumulator, outlier_product = (self.graph.getitem(product, place) for place in range(2))
        return self._call(
            mixq.dequantize.default, self.x, accumulator, outlier_product, scale, weight_scale, self.bias,
            providers.AUTO,
        )  # fmt: skip
