"""`verify`: checks the whole graph, so that a wrong rewrite is named here and not by a crash later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mixq_compile.errors import VerificationError
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.verify import verify
from mixq_compile.pipeline import Decision, Pass, PassContext


@dataclass(frozen=True)
class Verify(Pass):
    """Raises VerificationError with every shape, dtype, device or annotation that does not hold."""

    name: ClassVar[str] = "verify"

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One noted decision where everything holds."""
        nodes = [node for node in graph.graph.nodes if getattr(node.target, "namespace", None) == "mixq"]
        violations = verify(graph, nodes)
        if violations:
            listed = "\n".join(f"  {violation.node}: {violation.message}" for violation in violations)
            raise VerificationError(f"{len(violations)} violation(s) after the rewrites:\n{listed}")
        yield Decision(node="", fqn="", verdict="noted", reason=f"{len(nodes)} operators hold")
