"""Passes that spoil one rewrite of many, for bisection to find."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import Decision, Pass, PassContext

aten = torch.ops.aten


@dataclass(frozen=True)
class RewriteSubtractions(Pass):
    """Writes every subtraction anew; `swap` is the one whose operands it exchanges by mistake."""

    name: ClassVar[str] = "rewrite-subtractions"

    swap: int = 5

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        for number, node in enumerate(graph.walk(aten.sub.Tensor), 1):
            yield Decision.applied(node, "written anew")
            first, second = node.args
            with graph.graph.inserting_before(node):
                operands = (second, first) if number == self.swap else (first, second)
                graph.replace(node, graph.call(aten.sub.Tensor, operands, like=node))


@dataclass(frozen=True)
class FailAt(Pass):
    """Fails in the middle of a rewrite."""

    name: ClassVar[str] = "fail-at"

    number: int = 3

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        for number, node in enumerate(graph.walk(aten.sub.Tensor), 1):
            yield Decision.applied(node, "looked at")
            if number == self.number:
                raise ZeroDivisionError("scale is zero")


@dataclass(frozen=True)
class FailAtOnce(Pass):
    """Fails before it rewrites anything."""

    name: ClassVar[str] = "fail-at-once"

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        yield Decision(node="", fqn="", verdict="noted", reason="nothing yet")
        raise ZeroDivisionError("scale is zero")


@dataclass(frozen=True)
class LieAboutShape(Pass):
    """Records a wrong shape at one node, which verification finds."""

    name: ClassVar[str] = "lie-about-shape"

    number: int = 4

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        for number, node in enumerate(graph.walk(aten.sub.Tensor), 1):
            yield Decision.applied(node, "measured")
            value = graph.value(node)
            graph.set_value(node, value[:1] if number == self.number else value)
