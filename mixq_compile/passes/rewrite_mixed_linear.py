"""`rewrite-mixed-linear`: a linear with a scheme becomes quantize → mixed_gemm → dequantize."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.formats import TensorFormat
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.shapes import row_count
from mixq_compile.ops import providers
from mixq_compile.ops.operands import operand, operands
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.ops.weight_codes import format_operand, told_by_codes
from mixq_compile.passes._input_changes import since_calibration
from mixq_compile.passes._mixed_linear import MixedLinear, write_weight_only
from mixq_compile.passes._obstacles import Obstacle
from mixq_compile.pipeline import Decision, Pass, PassContext, WeightProvider
from mixq_compile.scheme import QuantScheme
from mixq_compile.selection.statistics import input_statistics
from mixq_compile.weights.recipe import keeps_columns, outliers_from_codes

COMPUTED = "its weight is computed, not a parameter: only parameters can be packed"


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
    """The provider whose small_m holds: up to so many rows the weight-only kernel runs."""

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each linear that has a scheme."""
        chosen: dict[Node, _Quantizable] = {}
        for node in self._with_scheme(graph):
            linear = _Quantizable.of(graph, node)
            if linear is None:
                blamed = Obstacle(COMPUTED, (operand(node, "weight").name,))
                yield Decision.skipped(node, COMPUTED, fqn=Annotations(node).fqn, details=blamed.details)
                Annotations(node).skip = COMPUTED
            else:
                chosen[node] = linear
        if not chosen:
            return
        store = context.store(self)
        store.prepare([(each.weight, each.scheme) for each in chosen.values()], self.originals)
        for node, linear in chosen.items():
            graph.current = node
            view, scheme = Annotations(node), linear.scheme
            small_m = self._small_m(graph, node, scheme)
            fixed, _ = row_count(graph.value(operand(node, "input")))
            few_rows = fixed is not None and fixed <= small_m
            activation = None if few_rows else scheme.activation
            kind = "weight-only product" if activation is None else _steps(scheme)
            yield Decision.applied(node, f"{scheme.name}: {kind}", fqn=view.fqn)
            rewriter = _Rewriter(graph, store, node, linear, self.originals, context.stats)
            with graph.graph.inserting_before(node):
                if activation is None:
                    result = rewriter.weight_only()
                else:
                    result = rewriter.mixed(activation, small_m)
            graph.replace(node, result)

    def _with_scheme(self, graph: CapturedGraph) -> list[Node]:
        """The linears that have a scheme and were not left alone."""
        linears = graph.walk(torch.ops.aten.linear.default)
        views = {node: Annotations(node) for node in linears}
        return [node for node, view in views.items() if view.parameters is not None and view.skip is None]

    def _small_m(self, graph: CapturedGraph, node: Node, scheme: QuantScheme) -> int:
        if self.batch_invariant or scheme.activation is None or scheme.recipe.sums:
            return 0
        if scheme.outliers is not None and keeps_columns(scheme.recipe, scheme.outliers.miss):
            return 0
        x, weight = graph.value(operand(node, "input")), graph.value(operand(node, "weight"))
        out_features, in_features = weight.shape
        query = providers.linear_query(x, out_features, in_features, scheme.weight, scheme.activation)
        return providers.small_batch_limit(query, self.kernel)


def _steps(scheme: QuantScheme) -> str:
    quantize = "quantize_affine" if scheme.recipe.sums else "quantize"
    product = "mixed_gemm, dequantize" if told_by_codes(scheme.weight) else "grouped_linear"
    return f"{quantize}, {product}" + (", low-rank part" if scheme.low_rank is not None else "")


@dataclass(frozen=True)
class _Quantizable:
    """A linear's parameter and the scheme that it is packed in."""

    parameter: Node
    weight: Tensor
    scheme: QuantScheme

    @classmethod
    def of(cls, graph: CapturedGraph, node: Node) -> _Quantizable | None:
        """The parameter behind a linear that has a scheme; None where its weight is computed."""
        parameter, parameters = graph.weight_parameter(operand(node, "weight")), Annotations(node).parameters
        tensor = graph.tensor(parameter)
        if parameter is None or tensor is None or parameters is None:
            return None
        return cls(parameter, tensor, QuantScheme.from_json(parameters))


class _Rewriter:
    """Builds the nodes that stand for one linear."""

    def __init__(
        self,
        graph: CapturedGraph,
        store: WeightProvider,
        node: Node,
        linear: _Quantizable,
        originals: bool,
        stats: Any,
    ) -> None:
        parameter, tensor, scheme = linear.parameter, linear.weight, linear.scheme
        self.graph, self.store, self.node, self.scheme = graph, store, node, scheme
        self.view = Annotations(node)
        given = operands(node)
        self.x, self.weight_matrix, self.bias = given["input"], given["weight"], given["bias"]
        self.tensor = tensor
        self.view.readers = [parameter.name]
        self.packed = store.pack(
            tensor,
            scheme,
            dtype=graph.value(self.x).dtype,
            transposed=parameter is not self.weight_matrix,
            statistics=input_statistics(stats, self.view.fqn or "", scheme, *since_calibration(graph, node)),
        )
        self.stem = graph.parameter_name(parameter)
        self.originals = (
            originals and not store.is_released(tensor) and not outliers_from_codes(scheme.recipe)
        )

    def _attach(self, what: str, tensor: Tensor) -> Node:
        return self.graph.attach(f"{self.stem}.{what}", tensor)

    def _write(self, operator: Any, named: Mapping[str, Any]) -> Node:
        return self.graph.call(operator, named, like=self.node)

    def _weight(self) -> dict[str, Any]:
        parts = {
            name: self._attach(name.removeprefix("weight_"), tensor)
            for name, tensor in self.packed.named().items()
        }
        return {"x": self.x, **parts, "bias": self.bias, **format_operand(self.scheme.weight)}

    def weight_only(self) -> Node:
        return write_weight_only(self._weight(), self._write)

    def mixed(self, activation: TensorFormat, small_m: int) -> Node:
        packed, scheme, view = self.packed, self.scheme, self.view
        in_features = self.graph.value(self.weight_matrix).shape[1]
        state = self.store.state([self.tensor], scheme, in_features, view.outlier_columns, view.column_max)
        self.store.fill(packed, self.tensor, state)
        buffers = zip(STATE_FIELDS, state.buffers(), strict=True)
        given = self._weight()
        given |= {name: self._attach(name, buffer) for name, buffer in buffers}
        given["cached_index"] = self._attach("cached_index", packed.cached_index)
        given["outlier_weight"] = self._attach("outlier_weight", packed.outlier_weight)
        given["original"] = self._original()
        parts = MixedLinear(
            operands=given,
            format=str(activation),
            policy=scheme.to_json()["outliers"],
            columns=view.outlier_columns,
            small_m=small_m,
        )
        return parts.write(self.graph, self._write)

    def _original(self) -> Node:
        if self.originals:
            return cast(Node, self.weight_matrix)
        return self._attach("no_original", self.packed.outlier_weight.new_empty(0))
