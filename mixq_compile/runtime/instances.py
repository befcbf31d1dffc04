"""One Dynamo graph, several modules: a compiled graph for each set of weights that it is called with.

Dynamo runs one graph for all modules of a class that look alike (the layers of a model compiled one by
one), and goes on running it where a parameter is replaced by another. Packed weights belong to parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.runtime import torch_compat
from mixq_compile.runtime.compiled_graph import CompiledGraph, copy_graph_module
from mixq_compile.runtime.weight_store import STORE

Compile = Callable[[CapturedGraph, Sequence[Any]], CompiledGraph]


class GraphInstances:
    """What Dynamo calls: finds, or compiles, the graph for the weights among the arguments."""

    def __init__(self, module: GraphModule, example_inputs: Sequence[Any], compile_graph: Compile) -> None:
        """Compiles the graph for the weights it was captured with."""
        self._compile = compile_graph
        self._untouched = copy_graph_module(module)
        graph = CapturedGraph.from_dynamo(module, example_inputs)
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        owned = [
            (place, tensor, list(node.users))
            for place, node in enumerate(placeholders)
            if (tensor := graph.tensor(node)) is not None
        ]
        compiled = self._compile(graph, example_inputs)
        self._owned = [place for place, _, _ in owned]
        # Of the buffers only those that the compiled graph depends on: others may be new in every call.
        self._identified = [
            place
            for place, tensor, readers in owned
            if isinstance(tensor, nn.Parameter)
            or STORE.followers(tensor)
            or any(reader.target is torch.ops.mixq.linear.default for reader in readers)
        ]
        self._instances: list[tuple[list[weakref.ref[Tensor]], CompiledGraph]] = []
        self._remember(compiled, example_inputs)

    def _remember(self, compiled: CompiledGraph, arguments: Sequence[Any]) -> None:
        alive = [entry for entry in self._instances if all(weight() is not None for weight in entry[0])]
        weights = [weakref.ref(arguments[place]) for place in self._identified]
        self._instances = [(weights, compiled), *alive]

    def _compile_for(self, arguments: Sequence[Any]) -> CompiledGraph:
        """Compiles the untouched graph for other weights; shapes stay as symbolic as they were captured."""
        module = copy_graph_module(self._untouched)
        captured = CapturedGraph.from_dynamo(module, arguments)
        placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
        example_inputs = [captured.value(node) for node in placeholders]
        for place in self._owned:
            example_inputs[place] = torch_compat.fake_parameter(captured.fake_mode, arguments[place])
        with torch_compat.tracing(captured.fake_mode):
            compiled = self._compile(captured, example_inputs)
        self._remember(compiled, arguments)
        return compiled

    def __call__(self, *arguments: Any) -> Any:
        """Runs the graph on Dynamo's arguments, parameters included."""
        for weights, compiled in self._instances:
            if all(weight() is arguments[at] for weight, at in zip(weights, self._identified, strict=True)):
                return compiled(*arguments)
        return self._compile_for(arguments)(*arguments)
