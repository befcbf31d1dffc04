"""`share-quantize`: readers of one value with one policy share one quantization and one state."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.effects import is_written_between
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.pipeline import Decision, Pass, PassContext
from mixq_compile.scheme import QuantScheme

mixq = torch.ops.mixq
STATE_ARGUMENTS = {mixq.quantize.default: (0, 1, 3), mixq.quantize_online.default: (0, 1, 2, 3, 4)}
"""Which of STATE_FIELDS an operator takes, from its second argument on."""
SMALL_M = -2
"""The place of `small_m` in the arguments of quantize, quantize_online and refresh_outlier_weights."""
REFRESH_LISTS = slice(3, 8)
"""The arguments of refresh_outlier_weights that hold one item for each linear."""


def _policy_key(node: Node) -> str:
    """What must be equal for two quantizations of one value to be the same."""
    view = Annotations(node)
    arguments: tuple[Any, ...] = (*node.args[:SMALL_M], *node.args[SMALL_M + 1 :])
    return json.dumps(
        {
            "operator": str(node.target),
            "arguments": [argument for argument in arguments if not isinstance(argument, Node)],
            "policy": view.policy,
            "columns": view.outlier_columns,
        }
    )


def _take_smaller_switch_point(first: Node, other: Node) -> None:
    """Lets both quantize from the fewer rows on: one of them would be left without codes otherwise."""
    smaller = min(first.args[SMALL_M], other.args[SMALL_M])  # type: ignore[type-var]
    for node in (first, _refresh_of(first)):
        if node is not None:
            node.args = (*node.args[:SMALL_M], smaller, *node.args[SMALL_M + 1 :])


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
        sources = {node.name: node for node in graph.graph.nodes if node.op in ("placeholder", "get_attr")}
        by_value: dict[Node, list[Node]] = defaultdict(list)
        for node in graph.graph.nodes:
            if node.target in STATE_ARGUMENTS:
                by_value[node.args[0]].append(node)
        for value, nodes in by_value.items():
            groups: dict[str, list[Node]] = defaultdict(list)
            for node in nodes:
                groups[_policy_key(node)].append(node)
            if len(groups) > 1:
                for members in groups.values():
                    reason = "reads a value that others quantize with another scheme, policy or columns"
                    yield Decision.skipped(members[0], reason, fqn=Annotations(members[0]).fqn)
            for first, *others in groups.values():
                for other in others:
                    fqn = Annotations(other).fqn
                    if is_written_between(value, first, other):
                        reason = "the value is changed in place between the two"
                        yield Decision.skipped(other, reason, fqn=fqn)
                        continue
                    reason = f"shares the quantization of {Annotations(first).fqn}"
                    yield Decision.applied(other, reason, fqn=fqn)
                    self._merge(graph, context, sources, first, other)

    def _merge(
        self,
        graph: CapturedGraph,
        context: PassContext,
        sources: Mapping[str, Node],
        first: Node,
        other: Node,
    ) -> None:
        self._join_states(graph, context, sources, first, other)
        _take_smaller_switch_point(first, other)
        kept_refresh, other_refresh = _refresh_of(first), _refresh_of(other)
        if kept_refresh is not None and other_refresh is not None:
            self._join_refreshes(graph, kept_refresh, other_refresh)
        kept = _getitems(first)
        for place, item in _getitems(other).items():
            if place not in kept:
                with graph.graph.inserting_after(first):
                    kept[place] = graph.getitem(first, place)
            graph.replace(item, kept[place])
        graph.graph.erase_node(other)

    def _join_states(
        self,
        graph: CapturedGraph,
        context: PassContext,
        sources: Mapping[str, Node],
        first: Node,
        other: Node,
    ) -> None:
        """Gives both one state: that of the set of weights behind them, or the first module's."""
        places = STATE_ARGUMENTS[first.target]  # type: ignore[index]
        mine: list[Node] = list(first.args[1 : 1 + len(places)])  # type: ignore[arg-type]
        theirs: list[Node] = list(other.args[1 : 1 + len(places)])  # type: ignore[arg-type]
        view = Annotations(first)
        joined = mine
        if view.readers is not None:
            view.readers = [*view.readers, *(Annotations(other).readers or ())]
            joined = self._shared_state(graph, context, sources, first, places)
        else:
            for node, bound in zip(mine, theirs, strict=True):
                if node is not bound:
                    context.weights.bind(graph.tensor(node), graph.tensor(bound))
        for nodes_before in (mine, theirs):
            for old, new in zip(nodes_before, joined, strict=True):
                if old is not new:
                    old.replace_all_uses_with(new)

    def _shared_state(
        self,
        graph: CapturedGraph,
        context: PassContext,
        sources: Mapping[str, Node],
        first: Node,
        places: tuple[int, ...],
    ) -> list[Node]:
        """The buffers of the state that all readers of a quantization share.

        `sources` are the graph's inputs and parameters by name.
        """
        view = Annotations(first)
        weights = [sources[name] for name in view.readers or ()]
        state = context.weights.state(
            [graph.tensor(node) for node in weights],
            QuantScheme.from_json(view.parameters or {}),
            graph.value(first.args[2]).shape[0],  # column_slot: K is symbolic where every size of x is
            view.outlier_columns,
            view.absmax,
        )
        stem = graph.parameter_name(weights[0])
        return [
            graph.attach(f"{stem}.shared.{STATE_FIELDS[place]}", state.buffers()[place]) for place in places
        ]

    def _join_refreshes(self, graph: CapturedGraph, kept: Node, other: Node) -> None:
        """Lets the first refresh serve both: the weights come before every product that reads them."""
        mine, theirs = kept.args[REFRESH_LISTS], other.args[REFRESH_LISTS]
        # One weight that reads the value twice must not be written twice.
        if theirs[0][0] not in mine[0]:  # type: ignore[index,operator]
            lists = [[*one, *another] for one, another in zip(mine, theirs, strict=True)]  # type: ignore[misc]
            self._hoist(kept, lists)
            start, stop = REFRESH_LISTS.start, REFRESH_LISTS.stop
            kept.args = (*kept.args[:start], *lists, *kept.args[stop:])
        graph.graph.erase_node(other)

    def _hoist(self, before: Node, lists: list[list[Node]]) -> None:
        """Moves views of parameters that stand after `before` to just before it."""
        for node in (node for nodes in lists for node in nodes):
            if node > before:
                before.prepend(node)
