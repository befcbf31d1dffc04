"""`rewrite-mixed-linear`: a linear with a scheme becomes quantize → mixed_gemm → dequantize."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.shapes import row_count
from mixq_compile.ops import providers
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.passes._mixed_linear import MixedLinear
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
        chosen = self._chosen(graph)
        context.weights.prepare([(weight, scheme) for weight, scheme in chosen.values()], self.originals)
        for node, (_, scheme) in chosen.items():
            graph.current = node
            view = Annotations(node)
            small_m = self._small_m(graph, node, scheme)
            fixed, _ = row_count(graph.value(node.args[0]))
            weight_only = scheme.activation is None or (fixed is not None and fixed <= small_m)
            kind = "weight-only product" if weight_only else "quantize, mixed_gemm, dequantize"
            yield Decision.applied(node, f"{scheme.name}: {kind}", fqn=view.fqn)
            rewriter = _Rewriter(graph, context, node, scheme, self.originals)
            with graph.graph.inserting_before(node):
                result = rewriter.weight_only() if weight_only else rewriter.mixed(small_m)
            graph.replace(node, result)

    def _chosen(self, graph: CapturedGraph) -> dict[Node, tuple[Tensor, QuantScheme]]:
        """The linears that have a scheme, with their parameters."""
        found = {}
        for node in graph.graph.nodes:
            parameters = Annotations(node).parameters
            if node.target is torch.ops.aten.linear.default and parameters is not None:
                weight = graph.tensor(graph.weight_parameter(node.args[1]))
                assert weight is not None
                found[node] = weight, QuantScheme.from_json(parameters)
        return found

    def _small_m(self, graph: CapturedGraph, node: Node, scheme: QuantScheme) -> int:
        if self.batch_invariant or scheme.activation is None:
            return 0
        x, weight = graph.value(node.args[0]), graph.value(node.args[1])
        out_features, in_features = weight.shape
        query = providers.linear_query(x, out_features, in_features, scheme.weight.bits)
        return providers.small_batch_limit(query, self.kernel)


class _Rewriter:
    """Builds the nodes that stand for one linear."""

    def __init__(
        self, graph: CapturedGraph, context: PassContext, node: Node, scheme: QuantScheme, originals: bool
    ) -> None:
        self.graph, self.context, self.node, self.scheme = graph, context, node, scheme
        self.view = Annotations(node)
        self.x, self.weight_matrix, *rest = node.args
        self.bias: Any = rest[0] if rest else None
        parameter = graph.weight_parameter(self.weight_matrix)
        tensor = graph.tensor(parameter)
        assert parameter is not None
        assert tensor is not None
        self.tensor: Tensor = tensor
        self.view.readers = [parameter.name]
        self.packed = context.weights.pack(
            tensor,
            scheme,
            dtype=graph.value(self.x).dtype,
            transposed=parameter is not self.weight_matrix,
        )
        self.stem = graph.parameter_name(parameter)
        self.originals = originals and not context.weights.is_released(tensor)

    def _attach(self, what: str, tensor: Tensor) -> Node:
        return self.graph.attach(f"{self.stem}.{what}", tensor)

    def _call(self, operator: Any, *arguments: Any) -> Node:
        return self.graph.call(operator, arguments, like=self.node)

    def weight_only(self) -> Node:
        codes = self._attach("codes", self.packed.weight_codes)
        scale = self._attach("scale", self.packed.weight_scale)
        return self._call(mixq.weight_only_linear.default, self.x, codes, scale, self.bias, providers.AUTO)

    def mixed(self, small_m: int) -> Node:
        packed, scheme, view = self.packed, self.scheme, self.view
        assert scheme.activation is not None
        assert view.parameters is not None
        in_features = self.graph.value(self.weight_matrix).shape[1]
        state = self.context.weights.state(
            [self.tensor], scheme, in_features, view.outlier_columns, view.absmax
        )
        self.context.weights.fill(packed, self.tensor, state)
        buffers = zip(STATE_FIELDS, state.buffers(), strict=True)
        parts = MixedLinear(
            x=self.x,  # type: ignore[arg-type]
            weight_codes=self._attach("codes", packed.weight_codes),
            weight_scale=self._attach("scale", packed.weight_scale),
            bias=self.bias,
            state=tuple(self._attach(name, buffer) for name, buffer in buffers),
            cached_index=self._attach("cached_index", packed.cached_index),
            outlier_weight=self._attach("outlier_weight", packed.outlier_weight),
            original=self._original(),
            bits=scheme.activation.bits,
            policy=view.parameters["outliers"],
            columns=view.outlier_columns,
            small_m=small_m,
        )
        return parts.write(self.graph, self._call)

    def _original(self) -> Node:
        if self.originals:
            return self.weight_matrix  # type: ignore[return-value]
        return self._attach("no_original", self.packed.outlier_weight.new_empty(0))
