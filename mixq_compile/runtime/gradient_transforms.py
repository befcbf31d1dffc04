"""Gradients that a model takes in its own forward, in a graph that runs without them otherwise."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from mixq_compile.ir.captured_calls import captured_argument
from mixq_compile.runtime.torch_compat import SET_GRADIENTS


def enable_gradients_inside_transforms(module: GraphModule) -> None:
    """Turns gradients on from the begin to the end of each outermost `torch.func.grad` or `vjp`.

    Dynamo writes that into its graph where gradients were off at the capture, and nothing where they were
    on; a graph of mixq runs with them off either way, and a gradient would come out as zeros.
    """
    graph, depth, outside = module.graph, 0, False
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if node.target is SET_GRADIENTS and not depth:
            outside = bool(captured_argument(node, 0, "enabled"))
        elif name == "_grad_increment_nesting":
            if not depth:
                _set_gradients(module, node.prev, True)
            depth += 1
        elif name == "_grad_decrement_nesting":
            depth -= 1
            if not depth:
                _set_gradients(module, node, outside)
    module.recompile()


def _set_gradients(module: GraphModule, after: Node, on: bool) -> None:
    with module.graph.inserting_after(after):
        module.graph.call_function(SET_GRADIENTS, (on,))
