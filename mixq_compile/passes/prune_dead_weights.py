"""`prune-dead-weights`: deletes attributes and computations that nothing reads any more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import Decision, Pass, PassContext


@dataclass(frozen=True)
class PruneDeadWeights(Pass):
    """Erases dead nodes, then every parameter and buffer of the graph module without a reader."""

    name: ClassVar[str] = "prune-dead-weights"

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """Placeholders stay: the caller passes them."""
        graph.eliminate_dead_code()
        for name in graph.unread_attributes():
            yield Decision(node=name, fqn=name, verdict="applied", reason="no reader is left: deleted")
            graph.delete_attribute(name)
