"""`share-quantize`: readers of one value with one policy share one quantization and one state."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.annotations import annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.pipeline import Decision, Pass, PassContext
from mixq_compile.scheme import QuantScheme

mixq = torch.ops.mixq
STATE_ARGUMENTS = {mixq.quantize.default: (0, 1, 3), mixq.quantize_online.default: (0, 1, 2, 3, 4)}
"""Which of STATE_FIELDS an operator takes, from its second argument on."""


def _policy_key(node: Node) -> str:
    """What must be equal for two quantizations of one value to be the same."""
    view = annotations(node)
    return json.dumps(
        {
            "operator": str(node.target),
            "arguments": [argument for argument in node.args if not isinstance(argument, Node)],
            "outliers": (view.parameters or {}).get("outliers"),
            "columns": view.outlier_columns,
        }
    )


def _getitems(node: Node) -> dict[int, Node]:
    return {int(user.args[1]): user for user in node.users if len(user.args) > 1}  # type: ignore[arg-type]


def _refresh_of(node: Node) -> Node | None:
    """The refresh_outlier_weights node that reads a quantization's codes."""
    codes = _getitems(node).get(0)
    readers = codes.users if codes is not None else ()
    return next((user for user in readers if user.target is mixq.refresh_outlier_weights.default), None)


@dataclass(frozen=True)
class ShareQuantize(Pass):
    """Merges quantizations of one value: n readers, one quantize node."""

    name: ClassVar[str] = "share-quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"mixed-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each quantization that is merged, or that could not be."""
        by_value: dict[Node, list[Node]] = defaultdict(list)
        for node in graph.graph.nodes:
            if node.target in STATE_ARGUMENTS:
                by_value[node.args[0]].append(node)
        for nodes in by_value.values():
            groups: dict[str, list[Node]] = defaultdict(list)
            for node in nodes:
                groups[_policy_key(node)].append(node)
            if len(groups) > 1:
                for members in groups.values():
                    reason = "reads a value that others quantize with another scheme, policy or columns"
                    yield Decision.skipped(members[0], reason, fqn=annotations(members[0]).fqn)
            for first, *others in groups.values():
                for other in others:
                    reason = f"shares the quantization of {annotations(first).fqn}"
                    yield Decision.applied(other, reason, fqn=annotations(other).fqn)
                    self._merge(graph, context, first, other)

    def _merge(self, graph: CapturedGraph, context: PassContext, first: Node, other: Node) -> None:
        self._join_states(graph, context, first, other)
        kept_refresh, other_refresh = _refresh_of(first), _refresh_of(other)
        if kept_refresh is not None and other_refresh is not None:
            # The readers' weights come before every product that reads them, so the first place is early enough.
            lists = [
                [*kept_refresh.args[place], *other_refresh.args[place]]  # type: ignore[misc]
                for place in range(3, 8)
            ]
            self._hoist(graph, kept_refresh, lists)
            kept_refresh.args = (*kept_refresh.args[:3], *lists, *kept_refresh.args[8:])
            graph.graph.erase_node(other_refresh)
        kept = _getitems(first)
        for place, item in _getitems(other).items():
            if place not in kept:
                with graph.graph.inserting_after(first):
                    kept[place] = graph.getitem(first, place)
            item.replace_all_uses_with(kept[place])
            graph.graph.erase_node(item)
        graph.graph.erase_node(other)

    def _join_states(self, graph: CapturedGraph, context: PassContext, first: Node, other: Node) -> None:
        """Gives both one state: that of the set of weights behind them, or the first module's."""
        places = STATE_ARGUMENTS[first.target]  # type: ignore[index]
        mine: list[Node] = list(first.args[1 : 1 + len(places)])  # type: ignore[arg-type]
        theirs: list[Node] = list(other.args[1 : 1 + len(places)])  # type: ignore[arg-type]
        view = annotations(first)
        joined = mine
        if view.readers is not None:
            weights = [*view.readers, *(annotations(other).readers or ())]
            view.readers = weights
            nodes = {node.name: node for node in graph.graph.nodes}
            state = context.weights.state(
                [graph.tensor(nodes[name]) for name in weights],  # type: ignore[misc]
                QuantScheme.from_json(view.parameters or {}),
                graph.value(first.args[0]).shape[-1],
                view.outlier_columns,
                view.absmax,
            )
            stem = graph.parameter_name(nodes[weights[0]])
            joined = [
                graph.attach(f"{stem}.shared.{STATE_FIELDS[place]}", state.buffers()[place])
                for place in places
            ]
        else:
            for node, bound in zip(mine, theirs, strict=True):
                context.weights.bind(graph.tensor(node), graph.tensor(bound))  # type: ignore[arg-type]
        for nodes_before in (mine, theirs):
            for old, new in zip(nodes_before, joined, strict=True):
                if old is not new:
                    old.replace_all_uses_with(new)

    def _hoist(self, graph: CapturedGraph, before: Node, lists: list[list[Node]]) -> None:
        """Moves views of parameters that stand after `before` to just before it."""
        order = {node: place for place, node in enumerate(graph.graph.nodes)}
        for node in (node for nodes in lists for node in nodes):
            if order[node] > order[before]:
                before.prepend(node)
