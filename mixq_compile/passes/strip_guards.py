"""`strip-guards`: removes what has no effect at inference and hides a linear from its reader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.captured_calls import captured_argument
from mixq_compile.ir.effects import is_region
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.regions import inline, is_transparent, region_name
from mixq_compile.pipeline import Decision, Pass, PassContext

DETACHES = (torch.ops.aten.detach.default, torch.Tensor.detach, torch.detach, "detach")
ATEN_DROPOUT = torch.ops.aten.dropout.default
DROPOUTS = (torch.nn.functional.dropout, ATEN_DROPOUT)
ASSERTIONS = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_async.default,
    torch.ops.aten._assert_async.msg,
)


def _is_idle_dropout(node: Node) -> bool:
    """True for a dropout that passes its input through because it is not training, or drops nothing."""
    if node.target not in DROPOUTS:
        return False
    probability = captured_argument(node, 1, "p", 0.5)
    training = captured_argument(node, 2, "train" if node.target is ATEN_DROPOUT else "training", True)
    return training is False or (isinstance(probability, (int, float)) and probability == 0)


def _transparent_region(graph: CapturedGraph) -> Node | None:
    return next((node for node in graph.graph.nodes if is_region(node) and is_transparent(graph, node)), None)


@dataclass(frozen=True)
class StripGuards(Pass):
    """Erases guard calls, metadata assertions, detaches and dropouts of evaluation mode; inlines regions."""

    name: ClassVar[str] = "strip-guards"

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """Erases each of them; readers of a detach or dropout read its input.

        A region that only says how gradients are taken or recomputed is replaced by what it computes.
        """
        while (region := _transparent_region(graph)) is not None:
            yield Decision.applied(region, f"{region_name(region)} has no effect at inference: inlined")
            inline(graph, region)
        for node in list(graph.graph.nodes):
            if node.op == "call_module" and str(node.target).endswith("_guards_fn"):
                yield Decision.applied(node, "guard call erased")
                graph.graph.erase_node(node)
                delattr(graph.module, str(node.target))
            elif node.op == "call_function" and node.target in ASSERTIONS and not node.users:
                yield Decision.applied(node, "assertion erased")
                graph.graph.erase_node(node)
            elif node.op in ("call_function", "call_method") and (
                node.target in DETACHES or _is_idle_dropout(node)
            ):
                source = captured_argument(node, 0, "input")
                assert isinstance(source, Node)
                yield Decision.applied(node, "no effect at inference: erased")
                node.replace_all_uses_with(source)
                graph.graph.erase_node(node)
