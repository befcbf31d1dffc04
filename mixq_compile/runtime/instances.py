"""One Dynamo graph, several modules: a compiled graph for each set of weights that it is called with.

Dynamo runs one graph for all modules of a class that look alike (the layers of a model compiled one by
one), and goes on running it where a parameter is replaced by another. Packed weights belong to parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.runtime import torch_compat
from mixq_compile.runtime.compiled_graph import CompiledGraph, copy_graph_module

Compile = Callable[[CapturedGraph, Sequence[Any]], CompiledGraph]


class GraphInstances:
    """What Dynamo calls: finds, or compiles, the graph for the weights among the arguments."""

    def __init__(self, module: GraphModule, example_inputs: Sequence[Any], compile_graph: Compile) -> None:
        """Compiles the graph for the weights it was captured with."""
        self._compile = compile_graph
        self._untouched = copy_graph_module(module)
        graph = CapturedGraph.from_dynamo(module, example_inputs)
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._owned = [place for place, node in enumerate(placeholders) if graph.tensor(node) is not None]
        self._instances: list[tuple[list[weakref.ref[Tensor]], CompiledGraph]] = []
        self._add(graph, example_inputs, example_inputs)

    def _add(
        self, graph: CapturedGraph, example_inputs: Sequence[Any], arguments: Sequence[Any]
    ) -> CompiledGraph:
        compiled = self._compile(graph, example_inputs)
        alive = [entry for entry in self._instances if all(weight() is not None for weight in entry[0])]
        self._instances = [([weakref.ref(arguments[place]) for place in self._owned], compiled), *alive]
        return compiled

    def _compile_for(self, arguments: Sequence[Any]) -> CompiledGraph:
        """Compiles the untouched graph for other weights; shapes stay as symbolic as they were captured."""
        module = copy_graph_module(self._untouched)
        captured = CapturedGraph.from_dynamo(module, arguments)
        placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
        example_inputs = [captured.value(node) for node in placeholders]
        for place in self._owned:
            example_inputs[place] = torch_compat.fake_parameter(captured.fake_mode, arguments[place])
        with torch_compat.tracing(captured.fake_mode):
            return self._add(captured, example_inputs, arguments)

    def __call__(self, *arguments: Any) -> Any:
        """Runs the graph on Dynamo's arguments, parameters included."""
        for weights, compiled in self._instances:
            if all(weight() is arguments[place] for weight, place in zip(weights, self._owned, strict=True)):
                return compiled(*arguments)
        return self._compile_for(arguments)(*arguments)
