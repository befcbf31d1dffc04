"""Reading a linear in a graph: which node transposes, and which parameter is behind a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Node

aten = torch.ops.aten
TRANSPOSES = (torch.t, aten.t.default, aten.numpy_T.default, aten.mT.default, "t")
SWAPS = (torch.transpose, aten.transpose.int, "transpose", torch.permute, aten.permute.default, "permute")


def transposed_source(node: Node) -> Node | None:
    """The 2-D value that this node transposes, or None where it does something else."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    source = node.args[0]
    if not isinstance(source, Node):
        return None
    if node.target in TRANSPOSES:
        return source
    if node.target is getattr and node.args[1] in ("T", "mT"):
        return source
    if node.target in SWAPS:
        axes = node.args[1] if len(node.args) == 2 else node.args[1:]
        if isinstance(axes, (list, tuple)) and sorted(axis % 2 for axis in axes) == [0, 1]:  # type: ignore[operator]
            is_permutation = node.target in SWAPS[3:]
            if not is_permutation or axes[0] % 2 == 1:  # type: ignore[operator]
                return source
    return None


def features_of(weight: Sequence[int], result: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of a linear in whatever spelling, from the sizes of its weight and its result.

    Its weight may be [N, K] or [K, N]: the outputs are what the result's last size is. (0, 0) where the
    weight has fewer than two sizes.
    """
    if len(weight) < 2:
        return 0, 0
    rows, columns = weight[-2:]
    return (columns, rows) if result and result[-1] == columns else (rows, columns)


def is_conv1d(module: nn.Module) -> bool:
    """True for the Conv1D of transformers: a linear whose weight is [K, N]. Does not import transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


EQUIVALENT_SUBCLASSES = ("transformers.models.falcon.modeling_falcon.FalconLinear",)
"""Subclasses of nn.Linear that compute just what it does. Of others nothing is known: they stay."""


def is_plain_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` itself and for subclasses known to compute the same."""
    kind = type(module)
    return kind is nn.Linear or f"{kind.__module__}.{kind.__qualname__}" in EQUIVALENT_SUBCLASSES
