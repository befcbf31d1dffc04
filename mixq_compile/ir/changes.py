"""Which nodes a pass touched, found without printing the graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from mixq_compile.ir.annotations import KEY
from mixq_compile.ir.graph import CapturedGraph


@dataclass(frozen=True)
class Changes:
    """How a graph differs from an earlier `Fingerprint` of it."""

    created: tuple[Node, ...]
    changed: tuple[Node, ...]
    """Nodes whose operator, arguments, value or annotations are others."""
    erased: int
    moved: bool

    def __bool__(self) -> bool:
        return bool(self.created or self.changed or self.erased or self.moved)

    def touched(self) -> list[Node]:
        """The nodes to verify: new and changed ones, and whoever reads a changed one."""
        readers: Iterable[Node] = (reader for node in self.changed for reader in node.users)
        return list(dict.fromkeys((*self.created, *self.changed, *readers)))


class Fingerprint:
    """The state of every node by identity; torch.fx and `Annotations` replace what they change."""

    def __init__(self, graph: CapturedGraph) -> None:
        """Takes the fingerprint; it keeps what it compares alive."""
        self._states = {node: _state(graph, node) for node in graph.graph.nodes}

    def changes(self, graph: CapturedGraph) -> Changes:
        """What has changed since; from now on this is the fingerprint of the graph as it is now."""
        before = self._states
        now = {node: _state(graph, node) for node in graph.graph.nodes}
        kept = [node for node in now if node in before]
        changed = [node for node in kept if any(map(operator.is_not, before[node], now[node]))]
        moved = [node for node in before if node in now] != kept
        self._states = now
        created = tuple(node for node in now if node not in before)
        return Changes(created, tuple(changed), len(before) - len(kept), moved)

    def accept(self, graph: CapturedGraph, nodes: Iterable[Node]) -> None:
        """Takes nodes as they are now: what was written since is no change."""
        self._states |= {node: _state(graph, node) for node in nodes}


def _state(graph: CapturedGraph, node: Node) -> tuple[Any, ...]:
    custom = node.meta.get("custom")
    annotations = custom.get(KEY) if isinstance(custom, dict) else None
    return node.op, node.target, node.args, node.kwargs, graph.value(node), annotations
