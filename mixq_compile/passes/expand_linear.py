"""`expand-linear`: the `mixq::linear` of a MixqLinear becomes its parts, so that passes see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.roles import role_of
from mixq_compile.ir.shapes import row_count
from mixq_compile.ops.linear import parse_policy, small_batch_limit_of
from mixq_compile.ops.outlier_state import COUNT
from mixq_compile.ops.providers import AUTO
from mixq_compile.passes._mixed_linear import MixedLinear
from mixq_compile.pipeline import Decision, Pass, PassContext

mixq = torch.ops.mixq


@dataclass(frozen=True)
class ExpandLinear(Pass):
    """Expands each `mixq::linear` into quantize, refresh, mixed_gemm and dequantize."""

    name: ClassVar[str] = "expand-linear"
    establishes: ClassVar[frozenset[str]] = frozenset({"mixed-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each `mixq::linear`."""
        for node in graph.walk(mixq.linear.default):
            fqn = graph.fqn(node)
            yield Decision.applied(node, "expanded into its parts", fqn=fqn)
            with graph.graph.inserting_before(node):
                result = self._expand(graph, node, fqn)
            graph.replace(node, result)

    def _expand(self, graph: CapturedGraph, node: Node, fqn: str) -> Node:
        arguments: tuple[Any, ...] = node.args
        x, weight_codes, weight_scale, bias, *rest = arguments
        state, (cached_index, outlier_weight, original) = tuple(rest[:5]), rest[5:8]
        bits, batch_invariant, policy_text = rest[8:]
        miss, threshold = parse_policy(policy_text)

        def call(operator: Any, *operands: Any) -> Node:
            made = graph.call(operator, operands, like=node)
            view = Annotations(made)
            view.fqn, view.role = fqn, role_of(fqn)
            return made

        in_features = graph.value(state[1]).shape[0]
        small_m = small_batch_limit_of(
            graph.value(x), graph.value(weight_codes), in_features, batch_invariant
        )
        fixed, _ = row_count(graph.value(x))
        if bits == 16 or (fixed is not None and fixed <= small_m):
            return call(mixq.weight_only_linear.default, x, weight_codes, weight_scale, bias, AUTO)
        slots = graph.value(state[0]).shape[0]
        policy = {"threshold": threshold, "capacity": slots, "miss": miss} if slots else None
        parts = MixedLinear(
            x=x,
            weight_codes=weight_codes,
            weight_scale=weight_scale,
            bias=bias,
            state=state,
            cached_index=cached_index,
            outlier_weight=outlier_weight,
            original=original,
            bits=bits,
            policy=policy,
            columns=self._fixed_columns(graph, state) if miss in ("static", "frozen") else None,
            small_m=small_m,
        )
        return parts.write(graph, call)

    def _fixed_columns(self, graph: CapturedGraph, state: tuple[Node, ...]) -> list[int] | None:
        """The columns of a state that no longer learns; another's would not do for it."""
        index, counters = graph.tensor(state[0]), graph.tensor(state[3])
        if index is None or counters is None or index.is_meta:
            return None
        return [int(column) for column in index[: int(counters[COUNT])].tolist()]
