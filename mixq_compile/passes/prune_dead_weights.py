"""`prune-dead-weights`: deletes attributes and computations that nothing reads any more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import Decision, Pass, PassContext


@dataclass(frozen=True)
class PruneDeadWeights(Pass):
    """Erases dead nodes, then every parameter and buffer of the graph module without a reader."""

    name: ClassVar[str] = "prune-dead-weights"

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each dead call and attribute; placeholders stay: the caller passes them."""
        for node in reversed(list(graph.graph.nodes)):
            if node.op != "get_attr" and graph.is_dead(node):
                graph.current = node
                yield Decision.applied(node, "nothing reads its result: erased")
                graph.graph.erase_node(node)
        graph.current = None
        dead: dict[str, list[Node]] = defaultdict(list)
        for node in graph.graph.nodes:
            if node.op == "get_attr" and graph.is_dead(node):
                dead[str(node.target)].append(node)
        for name in graph.unread_attributes():
            yield Decision(node=name, fqn=name, verdict="applied", reason="no reader is left: deleted")
            for node in dead.pop(name, ()):
                graph.graph.erase_node(node)
            graph.delete_attribute(name)
        # Something else reads the attributes of those that are left, or they are no tensors.
        for node in (node for nodes in dead.values() for node in nodes):
            graph.current = node
            yield Decision.applied(node, "nothing reads it: erased")
            graph.graph.erase_node(node)
