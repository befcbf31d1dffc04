"""`expand-linear`: the `mixq::linear` of a MixqLinear becomes its parts, so that passes see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.effects import inside_transforms
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.roles import role_of
from mixq_compile.ir.shapes import row_count
from mixq_compile.ops.linear import small_batch_limit_of
from mixq_compile.ops.linear_recipe import LinearRecipe
from mixq_compile.ops.operands import operands
from mixq_compile.ops.outlier_state import COUNT
from mixq_compile.ops.weight_codes import format_operand
from mixq_compile.passes._mixed_linear import MixedLinear, write_weight_only
from mixq_compile.pipeline import Decision, Pass, PassContext

mixq = torch.ops.mixq
TRANSFORMED = "it runs inside a transform such as torch.vmap, for which only the whole operator has a rule"


@dataclass(frozen=True)
class ExpandLinear(Pass):
    """Expands each `mixq::linear` into quantize, refresh, mixed_gemm and dequantize."""

    name: ClassVar[str] = "expand-linear"
    establishes: ClassVar[frozenset[str]] = frozenset({"mixed-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each `mixq::linear`."""
        transformed = inside_transforms(graph.graph.nodes)
        for node in graph.walk(mixq.linear.default):
            fqn = graph.fqn(node)
            if node in transformed:
                yield Decision.skipped(node, TRANSFORMED, fqn=fqn)
                continue
            yield Decision.applied(node, "expanded into its parts", fqn=fqn)
            with graph.graph.inserting_before(node):
                result = self._expand(graph, node, fqn)
            graph.replace(node, result)

    def _expand(self, graph: CapturedGraph, node: Node, fqn: str) -> Node:
        named = operands(node)
        recipe = LinearRecipe.parse(named["recipe"])
        given = {"x": named["x"], "bias": named["bias"]}
        given |= recipe.named(named["weight"], named["state"], named["cache"])
        given |= format_operand(recipe.weight.format)
        if named["row_mask"] is not None:
            given["row_mask"] = named["row_mask"]
        miss, activation = recipe.miss, recipe.activation
        index, counters = graph.tensor(given["index"]), graph.tensor(given["counters"])

        def write(operator: Any, named: Mapping[str, Any]) -> Node:
            made = graph.call(operator, named, like=node)
            view = Annotations(made)
            view.fqn, view.role = fqn, role_of(fqn, (out_features, in_features))
            return made

        x, in_features = graph.value(given["x"]), graph.value(given["column_slot"]).shape[0]
        out_features = graph.value(given["weight_codes"]).shape[0]
        small_m = small_batch_limit_of(x, out_features, in_features, recipe)
        fixed, _ = row_count(x)
        if activation is None or (fixed is not None and fixed <= small_m):
            return write_weight_only(given, write)
        slots = graph.value(given["index"]).shape[0]
        parts = MixedLinear(
            operands=given,
            format=str(activation),
            policy={"threshold": recipe.threshold, "capacity": slots, "miss": miss} if slots else None,
            columns=_fixed_columns(index, counters) if miss in ("static", "frozen") else None,
            small_m=small_m,
        )
        return parts.write(graph, write)


def _fixed_columns(index: Tensor | None, counters: Tensor | None) -> list[int] | None:
    """The columns of a state that no longer learns; another's would not do for it."""
    if index is None or counters is None or index.is_meta:
        return None
    return [int(column) for column in index[: int(counters[COUNT])].tolist()]
