"""Writes a pass that replaces the exact GELU by its tanh approximation, and runs it over a graph.

python examples/write_a_pass.py
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import mixq_compile as mixq
from mixq_compile.inspection.text import print_history
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import Decision, Pass, PassContext, Pipeline


@dataclass(frozen=True)
class ApproximateGelu(Pass):
    """Replaces the exact GELU by its tanh approximation."""

    name: ClassVar[str] = "approximate-gelu"

    at_least: int = 0
    """Leave smaller activations, counted in elements, alone."""

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """The rewrite comes after the yield: where a run's fuel is spent, it does not happen."""
        for node in graph.walk(torch.ops.aten.gelu.default):
            elements = node.meta["val"].numel()
            if elements < self.at_least:
                yield Decision.skipped(node, f"only {elements} elements")
                continue
            yield Decision.applied(node, "tanh in place of erf")
            node.kwargs = {"approximate": "tanh"}


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU()).eval()
    x = torch.randn(8, 64)

    graph = CapturedGraph.from_export(mixq.capture(model, (x,)))
    passes = Pipeline((*Pipeline.parse("strip-guards,canonicalize-linear"), ApproximateGelu(at_least=1000)))
    history = passes.run(graph, PassContext())

    print_history(history)
    for decision in history.decisions():
        print(f"{decision.verdict:8} {decision.node:10} {decision.reason}")


if __name__ == "__main__":
    main()
