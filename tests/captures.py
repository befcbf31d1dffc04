"""Captured graphs for tests: of hand-made modules, and of a small Llama."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from mixq_compile.ir.graph import CapturedGraph

ROUTES = ("dynamo", "export")


def capture(module: Any, *args: Any, route: str, dynamic: bool = False, **kwargs: Any) -> CapturedGraph:
    """The graph of a call, by one of the two routes; `dynamic`: its first dimension is symbolic."""
    return {"dynamo": capture_dynamo, "export": capture_export}[route](
        module, *args, dynamic=dynamic, **kwargs
    )


def capture_dynamo(module: Any, *args: Any, dynamic: bool = False, **kwargs: Any) -> CapturedGraph:
    found: list[CapturedGraph] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append(CapturedGraph.from_dynamo(graph_module, example_inputs))
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    (graph,) = found
    return graph


def capture_export(module: nn.Module, *args: Any, dynamic: bool = False, **kwargs: Any) -> CapturedGraph:
    shapes = {0: torch.export.Dim.DYNAMIC} if dynamic else None
    dynamic_shapes = tuple(shapes for _ in args) if not kwargs else None
    with torch.no_grad():
        return CapturedGraph.from_export(
            torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes)
        )


class TwoLayers(nn.Module):
    """A linear, an activation, a linear, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 8, bias=False)
        self.register_buffer("offset", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        return self.second(hidden) + self.offset


@functools.cache
def small_llama() -> tuple[nn.Module, torch.Tensor]:
    """An untrained Llama of two layers, and token ids for it."""
    transformers = __import__("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 50, (2, 6))


@functools.cache
def captured_llama(route: str) -> CapturedGraph:
    """The small Llama's graph, shared by tests that only read it."""
    model, ids = small_llama()
    return capture(model, input_ids=ids, route=route)


def linears(graph: CapturedGraph) -> list[torch.fx.Node]:
    """The nodes that call a linear, as either route spells it."""
    return list(graph.walk(torch._C._nn.linear, torch.ops.aten.linear.default))
