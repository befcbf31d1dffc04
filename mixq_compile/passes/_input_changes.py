"""What earlier passes did to the input of a linear, after its statistics were collected."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.without_data import has_data


def since_calibration(graph: CapturedGraph, node: Node) -> tuple[Tensor | None, str | None]:
    """What a linear's input is multiplied by, `[K]`, and what was done to it that no maximum survives."""
    view = Annotations(node)
    if view.rotated is not None:
        return None, "rotated"
    if view.equalized is None:
        return None, None
    inverse = graph.attribute(view.equalized)
    if not isinstance(inverse, Tensor) or not has_data(inverse):
        return None, "equalized by factors that this run does not know"
    return inverse, None
