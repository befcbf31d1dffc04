"""`select-kernels`: names the provider of each `mixq::` operator, and why the others were refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops import providers
from mixq_compile.pipeline import Decision, Pass, PassContext

WEIGHT_ARGUMENT = {
    "mixed_gemm": 3, "mixed_linear": 5, "activated_linear": 5, "weight_only_linear": 1,
    "quantized_linear": 9,
}  # fmt: skip
"""Where an operator takes its weight codes: their dtype tells the bits."""
SOURCE_ARGUMENT = {"mixed_gemm": 1, "refresh_outlier_weights": 4, "quantized_linear": 7}
"""Which argument tells device and dtype, where that is not the first."""


def operator_name(node: Node) -> str | None:
    """The name of the `mixq::` operator that a node calls, or None."""
    if node.op != "call_function" or getattr(node.target, "namespace", None) != "mixq":
        return None
    return str(node.target).split(".")[1]


@dataclass(frozen=True)
class SelectKernels(Pass):
    """Writes the provider's name into each operator's last argument; M is decided in the call."""

    name: ClassVar[str] = "select-kernels"
    requires: ClassVar[frozenset[str]] = frozenset({"mixed-linears"})
    establishes: ClassVar[frozenset[str]] = frozenset({"kernels"})

    kernel: str = "auto"
    """Name of a provider to use for every operator that it implements; auto takes the best one."""

    def _query(self, graph: CapturedGraph, node: Node, op: str) -> providers.KernelQuery:
        source = node.args[SOURCE_ARGUMENT.get(op, 0)]
        source = source[0] if isinstance(source, (list, tuple)) else source
        value = graph.value(source)
        bits = 8
        if op in WEIGHT_ARGUMENT:
            weight = graph.value(node.args[WEIGHT_ARGUMENT[op]])  # type: ignore[arg-type]
            bits = 4 if str(weight.dtype) == "torch.uint8" else 8
        return providers.KernelQuery(op, value.device, value.dtype, bits)

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each operator: the provider, and each refused one with its reason."""
        for node in graph.walk():
            op = operator_name(node)
            if op is None or op not in providers.operators():
                continue
            chosen, refused = self._choose(self._query(graph, node, op))
            reason = f"mixq::{op} by {chosen.name}"
            yield Decision.applied(node, reason, fqn=Annotations(node).fqn, details={"refused": refused})
            node.args = (*node.args[:-1], chosen.name)
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
