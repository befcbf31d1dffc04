"""`select-scheme`: the scheme of each linear, or the reason why it stays in 16 or 32 bit."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.fx import Node

from mixq_compile.ir.annotations import annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.linears import transposed_source
from mixq_compile.ir.shapes import row_count
from mixq_compile.ops import providers
from mixq_compile.pipeline import Decision, Pass, PassContext
from mixq_compile.scheme import QuantScheme, get_scheme

SMALLEST_FEATURES = 16
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGE_BATCH = 256
"""From this many rows on an integer product can win where it wins at all."""


def name_matches(fqn: str, pattern: str) -> bool:
    """True if the pattern is the name, one of its dotted parts, or a glob that fits it."""
    return fqn == pattern or pattern in fqn.split(".") or fnmatch.fnmatchcase(fqn, pattern)


@dataclass(frozen=True)
class SelectScheme(Pass):
    """Annotates each linear with a scheme, or with why it is skipped."""

    name: ClassVar[str] = "select-scheme"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical-linears"})
    establishes: ClassVar[frozenset[str]] = frozenset({"schemes"})

    default: str = "w8a8o16"
    """Scheme of every linear that nothing else decides."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Names, dotted name parts or glob patterns of linears to leave alone."""
    layers: tuple[str, ...] = ()
    """`pattern=scheme` for single linears; the first that fits decides."""
    threshold: float | None = None
    capacity: int | None = None
    miss: str | None = None
    force: bool = False
    """Quantize every eligible linear, even where it is not faster."""
    kernel: str = "auto"
    """The provider whose speed and support decide."""

    def scheme_for(self, fqn: str, role: str) -> QuantScheme:
        """The scheme of a linear of this name and role, with this pass's outlier options applied."""
        chosen = self.default
        for entry in self.layers:
            pattern, _, scheme = entry.rpartition("=")
            if name_matches(fqn, pattern):
                chosen = scheme
                break
        scheme = get_scheme(chosen)
        if role in scheme.eight_bit_roles:
            scheme = get_scheme("w8a8o16")
        changes = {"threshold": self.threshold, "capacity": self.capacity, "miss": self.miss}
        return scheme.with_outliers(**{name: value for name, value in changes.items() if value is not None})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each linear."""
        for node in graph.graph.nodes:
            if node.target is not torch.ops.aten.linear.default:
                continue
            view = annotations(node)
            scheme = self.scheme_for(view.fqn or "", view.role or "other")
            reason = self._ineligible(graph, node) or self._unsupported(graph, node, scheme)
            if reason is None and not self.force:
                reason = self._slower(graph, node, scheme)
            if reason is not None:
                yield Decision.skipped(node, reason, fqn=view.fqn)
                view.skip = reason
                continue
            yield Decision.applied(node, f"scheme {scheme.name}", fqn=view.fqn)
            view.scheme, view.parameters = scheme.name, scheme.to_json()

    def _ineligible(self, graph: CapturedGraph, node: Node) -> str | None:
        view = annotations(node)
        pattern = next((entry for entry in self.ignore if name_matches(view.fqn or "", entry)), None)
        if pattern is not None:
            return f"ignored: its name matches {pattern!r}"
        if view.role == "lm_head":
            return "the output head stays in 16 or 32 bit"
        matrix = node.args[1]
        assert isinstance(matrix, Node)
        weight = transposed_source(matrix) or matrix
        tensor = graph.tensor(weight)
        if tensor is None:
            return "its weight is computed, not a parameter"
        if view.role == "router":
            return "a router, or a functional use that no nn.Linear owns"
        if any(
            reader.target in (nn.functional.embedding, torch.ops.aten.embedding.default)
            for reader in weight.users
        ):
            return "its weight is tied to an embedding"
        if tensor.dtype not in FLOATS:
            return f"its weight is {tensor.dtype}, not a floating-point type that has kernels"
        if graph.value(node.args[0]).dtype not in FLOATS:
            return f"its input is {graph.value(node.args[0]).dtype}"
        if min(tensor.shape) < SMALLEST_FEATURES:
            return (
                f"too small: {tuple(tensor.shape)}, and an integer product needs {SMALLEST_FEATURES} of each"
            )
        return None

    def _query(self, graph: CapturedGraph, node: Node, scheme: QuantScheme) -> providers.KernelQuery:
        x, weight = graph.value(node.args[0]), graph.value(node.args[1])
        op = "mixed_linear" if scheme.activation else "weight_only_linear"
        out_features, in_features = weight.shape
        return providers.KernelQuery(op, x.device, x.dtype, scheme.weight.bits, in_features, out_features)

    def _unsupported(self, graph: CapturedGraph, node: Node, scheme: QuantScheme) -> str | None:
        if self.kernel != providers.AUTO or self.force:
            return None
        chosen, refused = providers.rejections(self._query(graph, node, scheme))
        if chosen is None or chosen.name == "ref":
            return "no fast kernel: " + "; ".join(f"{name}: {why}" for name, why in refused.items())
        return None

    def _slower(self, graph: CapturedGraph, node: Node, scheme: QuantScheme) -> str | None:
        """Why the linear would not be faster; None where it is, or where nothing is known."""
        query = self._query(graph, node, scheme)
        provider = (
            providers.choose(query)
            if self.kernel == providers.AUTO
            else providers.named(query.op, self.kernel)
        )
        if provider.speedup is None:
            return None
        fixed, traced = row_count(graph.value(node.args[0]))
        rows = [fixed] if fixed is not None else sorted({traced or LARGE_BATCH, LARGE_BATCH})
        speedups = {m: provider.speedup(query, m) for m in rows}
        known = {m: ratio for m, ratio in speedups.items() if ratio is not None}
        if not known or max(known.values()) >= 1.0:
            return None
        figures = ", ".join(f"{ratio:.2f}x at {m} rows" for m, ratio in known.items())
        return f"not faster with {provider.name}: {figures}"
