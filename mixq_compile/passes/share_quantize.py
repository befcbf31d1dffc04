"""`share-quantize`: readers of one value with one policy share one quantization and one state."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.operands import (
    listed_operands,
    operand,
    operands,
    result,
    results,
    set_operands,
)
from mixq_compile.ops.traits import traits_of
from mixq_compile.passes._obstacles import UNLIKE, Obstacle, written_between
from mixq_compile.pipeline import Decision, Pass, PassContext, WeightProvider
from mixq_compile.scheme import QuantScheme

mixq = torch.ops.mixq
SMALL_M = "small_m"
"""The operand that readers need not have in common: the smallest one serves all."""


def _policy_key(node: Node) -> str:
    """What must be equal for two quantizations of one value to be the same."""
    view = Annotations(node)
    traits = traits_of(node.target)
    own = {SMALL_M, *(traits.state if traits is not None else ())}
    given = {name: value for name, value in operands(node).items() if name not in own}
    return json.dumps(
        {
            "operator": str(node.target),
            "operands": {
                name: str(value) if isinstance(value, Node) else value for name, value in given.items()
            },
            "policy": view.policy,
            "columns": view.outlier_columns,
        }
    )


def _take_smaller_small_m(first: Node, other: Node) -> None:
    """Lets both quantize from the fewer rows on: one of them would be left without codes otherwise."""
    if SMALL_M not in operands(first):
        return
    smaller = min(operand(first, SMALL_M), operand(other, SMALL_M))
    for node in (first, _refresh_of(first)):
        if node is not None:
            set_operands(node, **{SMALL_M: smaller})


def _quantizations(graph: CapturedGraph) -> dict[Node, list[Node]]:
    """The nodes that quantize each value."""
    found: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        traits = traits_of(node.target)
        if traits is not None and traits.quantizes is not None:
            found[operand(node, traits.quantizes)].append(node)
    return found


def _state_of(node: Node) -> dict[str, Node]:
    """The buffers of the state that a quantization takes, by their names in STATE_FIELDS."""
    traits = traits_of(node.target)
    taken = traits.state if traits is not None else {}
    return {field: operand(node, name) for name, field in taken.items()}


def _refresh_of(node: Node) -> Node | None:
    """The refresh_outlier_weights node that reads a quantization's codes."""
    codes = result(node, "codes")
    readers = codes.users if codes is not None else ()
    return next((user for user in readers if user.target is mixq.refresh_outlier_weights.default), None)


def _computed_state(graph: CapturedGraph, *nodes: Node) -> Obstacle | None:
    """The obstacle that a state is no buffer, which could be joined with another's; None where all are."""
    buffers = [buffer for node in nodes for buffer in _state_of(node).values()]
    computed = [buffer for buffer in buffers if graph.tensor(buffer) is None]
    return Obstacle.of("an outlier state is computed, not a buffer", computed) if computed else None


@dataclass(frozen=True)
class ShareQuantize(Pass):
    """Merges quantizations of one value: n readers, one quantize node."""

    name: ClassVar[str] = "share-quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"mixed-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each quantization that is merged, or that could not be."""
        sources = {node.name: node for node in graph.graph.nodes if node.op in ("placeholder", "get_attr")}
        for value, nodes in _quantizations(graph).items():
            groups: dict[str, list[Node]] = defaultdict(list)
            for node in nodes:
                groups[_policy_key(node)].append(node)
            if len(groups) > 1:
                for node, *_ in groups.values():
                    others = [members[0] for members in groups.values() if members[0] is not node]
                    found = Obstacle.of(f"reads a value that others quantize {UNLIKE}", others)
                    fqn = Annotations(node).fqn
                    yield Decision.skipped(node, found.reason, fqn=fqn, details=found.details)
            for first, *others in groups.values():
                for other in others:
                    fqn = Annotations(other).fqn
                    obstacle = written_between(value, first, other, "the two") or _computed_state(
                        graph, first, other
                    )
                    if obstacle is not None:
                        yield Decision.skipped(other, obstacle.reason, fqn=fqn, details=obstacle.details)
                        continue
                    store = context.store(self)
                    reason = f"shares the quantization of {Annotations(first).fqn}"
                    yield Decision.applied(other, reason, fqn=fqn)
                    self._merge(graph, store, sources, first, other)

    def _merge(
        self,
        graph: CapturedGraph,
        store: WeightProvider,
        sources: Mapping[str, Node],
        first: Node,
        other: Node,
    ) -> None:
        self._join_states(graph, store, sources, first, other)
        _take_smaller_small_m(first, other)
        kept_refresh, other_refresh = _refresh_of(first), _refresh_of(other)
        if kept_refresh is not None and other_refresh is not None:
            self._join_refreshes(graph, kept_refresh, other_refresh)
        for name, item in results(other):
            kept = result(first, name)
            if kept is None:
                with graph.graph.inserting_after(first):
                    kept = graph.result(first, name)
            graph.replace(item, kept)
        graph.graph.erase_node(other)

    def _join_states(
        self,
        graph: CapturedGraph,
        store: WeightProvider,
        sources: Mapping[str, Node],
        first: Node,
        other: Node,
    ) -> None:
        """Gives both one state: that of the set of weights behind them, or the first module's."""
        mine, theirs = _state_of(first), _state_of(other)
        view = Annotations(first)
        joined = mine
        if view.readers is not None:
            view.readers = [*view.readers, *(Annotations(other).readers or ())]
            joined = self._shared_state(graph, store, sources, first)
        else:
            for name, node in mine.items():
                kept, bound = graph.tensor(node), graph.tensor(theirs[name])
                if kept is not None and bound is not None and kept is not bound:
                    store.bind(kept, bound)
        for before in (mine, theirs):
            for name, old in before.items():
                if old is not joined[name]:
                    old.replace_all_uses_with(joined[name])

    def _shared_state(
        self,
        graph: CapturedGraph,
        store: WeightProvider,
        sources: Mapping[str, Node],
        first: Node,
    ) -> dict[str, Node]:
        """The buffers of the state that all readers of a quantization share.

        `sources` are the graph's inputs and parameters by name.
        """
        view = Annotations(first)
        weights = [sources[name] for name in view.readers or ()]
        tensors = [tensor for node in weights if (tensor := graph.tensor(node)) is not None]
        state = store.state(
            tensors,
            QuantScheme.from_json(view.parameters or {}),
            # K of the state, because x's own is symbolic where every size of x is.
            graph.value(operand(first, "column_slot")).shape[0],
            view.outlier_columns,
            view.column_max,
        )
        stem = graph.parameter_name(weights[0])
        return {
            name: graph.attach(f"{stem}.shared.{name}", getattr(state, name)) for name in _state_of(first)
        }

    def _join_refreshes(self, graph: CapturedGraph, kept: Node, other: Node) -> None:
        """Lets the first refresh serve both: the weights come before every product that reads them."""
        # One weight that reads the value twice must not be written twice.
        if operand(other, "cached_index")[0] not in operand(kept, "cached_index"):
            theirs = listed_operands(other)
            lists = {name: [*items, *theirs[name]] for name, items in listed_operands(kept).items()}
            self._hoist(kept, lists.values())
            set_operands(kept, **lists)
        graph.graph.erase_node(other)

    def _hoist(self, before: Node, lists: Iterable[Sequence[Node]]) -> None:
        """Moves views of parameters that stand after `before` to just before it."""
        for node in (node for nodes in lists for node in nodes):
            if node > before:
                before.prepend(node)
