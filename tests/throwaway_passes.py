"""Small passes that exist for tests only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from captures import linears

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import Decision, Pass, PassContext, PassRegistry, fact

aten = torch.ops.aten


@fact("named", "each name on a linear is its module's")
def named(graph: CapturedGraph) -> Iterator[tuple[torch.fx.Node, str]]:
    for node in linears(graph):
        if Annotations(node).fqn not in (None, graph.fqn(node)):
            yield node, f"it is named {Annotations(node).fqn}"


@fact("negated", "two negations stand behind each linear")
def negated(graph: CapturedGraph) -> Iterator[tuple[torch.fx.Node, str]]:
    for node in linears(graph):
        if not all(user.target in (aten.neg.default, aten.mul.Scalar) for user in node.users):
            yield node, "something reads it as it is"


@dataclass(frozen=True)
class NegateTwice(Pass):
    """Puts two negations behind each linear."""

    name: ClassVar[str] = "negate-twice"
    requires: ClassVar[frozenset[str]] = frozenset({"named"})
    establishes: ClassVar[frozenset[str]] = frozenset({"negated"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        for node in linears(graph):
            yield Decision.applied(node, "negated twice")
            readers = list(node.users)
            with graph.graph.inserting_after(node):
                once = graph.call(aten.neg.default, (node,), like=node)
            with graph.graph.inserting_after(once):
                twice = graph.call(aten.neg.default, (once,), like=node)
            for reader in readers:
                reader.replace_input_with(node, twice)


@dataclass(frozen=True)
class AnnotateLinears(Pass):
    """Names each linear, with every kind of option."""

    name: ClassVar[str] = "annotate-linears"
    establishes: ClassVar[frozenset[str]] = frozenset({"named"})

    scheme: str = "w8a8o16"
    ignore: tuple[str, ...] = ("lm_head",)
    threshold: float = 6.0
    capacity: int | None = None
    limit: int = 3
    force: bool = False
    label: str | None = None
    miss: Literal["exact", "lazy"] = "exact"
    ratio: float | None = None
    layers: tuple[str, ...] | None = None

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        for node in graph.walk(torch._C._nn.linear, aten.linear.default):
            fqn = graph.fqn(node)
            if fqn in self.ignore:
                yield Decision.skipped(node, f"ignored: {fqn}", fqn=fqn, details={"options": self.ignore})
                continue
            yield Decision.applied(node, f"scheme {self.scheme}", fqn=fqn)
            Annotations(node).update({"fqn": fqn, "scheme": self.scheme})


@dataclass(frozen=True)
class ForgetNames(Pass):
    """Removes all annotations."""

    name: ClassVar[str] = "forget-names"
    invalidates: ClassVar[frozenset[str]] = frozenset({"named"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        for node in graph.walk():
            Annotations(node).clear()
        yield from ()


@dataclass(frozen=True)
class SwapOperands(Pass):
    """A wrong pass: swaps the operands of every linear without a bias."""

    name: ClassVar[str] = "swap-operands"

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        for node in linears(graph):
            if len(node.args) < 3 or node.args[2] is None:
                yield Decision.applied(node, "swapped")
                node.args = (node.args[1], node.args[0])


@dataclass(frozen=True)
class FailAtSecond(Pass):
    """A pass that fails at the second linear."""

    name: ClassVar[str] = "fail-at-second"
    after: int = 1

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        for number, node in enumerate(graph.walk(torch._C._nn.linear, aten.linear.default)):
            if number == self.after:
                raise ZeroDivisionError("scale is zero")
            yield Decision.noted(node, "looked at")


@dataclass(frozen=True)
class LowerNegations(Pass):
    """A lowering: pays no fuel, because half of it would not run."""

    name: ClassVar[str] = "lower-negations"
    requires: ClassVar[frozenset[str]] = frozenset({"negated"})
    spends_fuel: ClassVar[bool] = False

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        for node in graph.walk(aten.neg.default):
            yield Decision.applied(node, "a product")
            with graph.graph.inserting_before(node):
                graph.replace(node, graph.call(aten.mul.Scalar, (node.args[0], -1), like=node))


@dataclass(frozen=True)
class NotAGenerator(Pass):
    """Returns a list of what it has done already."""

    name: ClassVar[str] = "not-a-generator"

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        return [Decision.applied(node, "done") for node in linears(graph)]


PASSES = (
    NegateTwice, AnnotateLinears, ForgetNames, SwapOperands, FailAtSecond, LowerNegations, NotAGenerator,
)  # fmt: skip
REGISTRY = PassRegistry.of(
    *PASSES,
    pipelines={"usual": "annotate-linears,negate-twice", "whole": "usual,lower-negations"},
)
