"""`select-kernels`: names the provider of each `mixq::` operator, and why the others were refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops import providers
from mixq_compile.ops.operands import set_operands
from mixq_compile.ops.traits import traits_of
from mixq_compile.passes._kernel_queries import kernel_query
from mixq_compile.pipeline import Decision, Pass, PassContext


@dataclass(frozen=True)
class SelectKernels(Pass):
    """Writes the provider's name into each operator's `kernel`; M is decided in the call."""

    name: ClassVar[str] = "select-kernels"
    requires: ClassVar[frozenset[str]] = frozenset({"mixed-linears"})
    establishes: ClassVar[frozenset[str]] = frozenset({"kernels"})

    kernel: str = "auto"
    """Name of a provider to use for every operator that it implements; auto takes the best one."""

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each operator: the provider, and each refused one with its reason."""
        for node in graph.walk():
            traits = traits_of(node.target)
            if traits is None or traits.composite:
                continue
            chosen, refused = self._choose(kernel_query(graph, node))
            reason = f"mixq::{traits.name} by {chosen.name}"
            yield Decision.applied(node, reason, fqn=Annotations(node).fqn, details={"refused": refused})
            set_operands(node, kernel=chosen.name)
            Annotations(node).kernel = chosen.name

    def _choose(self, query: providers.KernelQuery) -> tuple[providers.Provider, dict[str, str]]:
        """The provider of one operator, and why others were refused."""
        implementing = {entry.name for entry in providers.providers_of(query.op)}
        if self.kernel == providers.AUTO or self.kernel not in implementing:
            chosen = providers.choose(query)
            _, refused = providers.rejections(query)
            if self.kernel != providers.AUTO:
                refused[self.kernel] = "does not implement this operator"
            return chosen, refused
        return providers.supporting(query, self.kernel), {}
