"""Which activation function a node of a graph computes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

aten, functional = torch.ops.aten, torch.nn.functional

RELU = (torch.relu, functional.relu, aten.relu.default)
SILU = (functional.silu, aten.silu.default)
GELU = (functional.gelu, aten.gelu.default)
ACTIVATIONS = (*RELU, *SILU, *GELU)


def activation_function(node: Any) -> str | None:
    """`relu`, `silu`, `gelu` (by the error function) or `gelu_tanh`; None for anything else, or in place."""
    if not isinstance(node, Node) or node.target not in ACTIVATIONS:
        return None
    if node.target in GELU:
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))
    if node.kwargs.get("inplace") or any(node.args[1:]):
        return None
    return "relu" if node.target in RELU else "silu"
