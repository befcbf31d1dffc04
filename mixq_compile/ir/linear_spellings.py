"""The spellings of a linear that a capture may hold, and what each computes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from mixq_compile.ir.captured_calls import captured_argument
from mixq_compile.ir.graph import CapturedGraph

aten = torch.ops.aten
CANONICAL = aten.linear.default
"""The one spelling that passes behind `canonicalize-linear` look for."""
LINEARS = (torch.nn.functional.linear, torch._C._nn.linear, CANONICAL)
ADDMMS = (torch.addmm, aten.addmm.default, "addmm")
PRODUCTS = (torch.matmul, torch.mm, operator.matmul, aten.mm.default, aten.matmul.default, "matmul", "mm")
ADDITIONS = (operator.add, torch.add, aten.add.Tensor, operator.iadd, aten.add_.Tensor, "add", "add_")


@dataclass(frozen=True)
class Attribute:
    """A tensor of the graph module, by its dotted name."""

    name: str
    tensor: Tensor


@dataclass(frozen=True)
class SpelledLinear:
    """What a matched node computes: `x · weightᵀ + bias`; `swapped`: the parameter is [K, N].

    Weight and bias are nodes, or attributes of the module that no node reads yet.
    """

    x: Node
    weight: Node | Attribute
    bias: Node | Attribute | None
    swapped: bool
    replaces: Node
    """The node whose value the linear is: the product, or the addition of its bias."""


def _is_parameter(graph: CapturedGraph, node: Any, dims: int) -> bool:
    tensor = graph.tensor(node) if isinstance(node, Node) else None
    return tensor is not None and tensor.dim() == dims and tensor.is_floating_point()


def _bias_addition(graph: CapturedGraph, product: Node, weight: Tensor, out_features: int) -> Node | None:
    """The only reader of a product if it adds a bias parameter, in the product's dtype."""
    if len(product.users) != 1:
        return None
    (reader,) = product.users
    terms = _terms(reader)
    if reader.target not in ADDITIONS or terms is None:
        return None
    bias = graph.tensor(_added(reader, product))
    if bias is None or bias.shape != (out_features,) or bias.dtype != weight.dtype:
        return None
    return reader


def _terms(addition: Node) -> tuple[Any, Any] | None:
    """The terms of `first + second`; None for a call that is given anything else, such as a factor."""
    return addition.args if len(addition.args) == 2 and not addition.kwargs else None  # type: ignore[return-value]


def _added(addition: Node, product: Node) -> Any:
    first, second = _terms(addition) or (None, None)
    return second if first is product else first


def _match_module(graph: CapturedGraph, node: Node) -> SpelledLinear | None:
    module = graph.module.get_submodule(str(node.target))
    if type(module) is not nn.Linear:
        return None
    weight = Attribute(f"{node.target}.weight", module.weight)
    bias = Attribute(f"{node.target}.bias", module.bias) if module.bias is not None else None
    return SpelledLinear(captured_argument(node, 0, "input"), weight, bias, False, node)


def _match_addmm(graph: CapturedGraph, node: Node) -> SpelledLinear | None:
    bias, x, matrix = (
        captured_argument(node, place, name) for place, name in enumerate(("input", "mat1", "mat2"))
    )
    scaled = node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1
    weight = graph.weight_parameter(matrix)
    if scaled or weight is None or not _is_parameter(graph, bias, dims=1):
        return None
    return SpelledLinear(x, weight, bias, weight is matrix, node)


def _match_product(graph: CapturedGraph, node: Node) -> SpelledLinear | None:
    x, matrix = captured_argument(node, 0, "input"), captured_argument(node, 1, "other")
    weight = graph.weight_parameter(matrix)
    tensor = graph.tensor(weight)
    is_activation = isinstance(x, Node) and graph.weight_parameter(x) is None
    if not is_activation or weight is None or tensor is None or not _is_parameter(graph, weight, dims=2):
        return None
    swapped = weight is matrix
    addition = _bias_addition(graph, node, tensor, tensor.shape[1 if swapped else 0])
    if addition is None:
        return SpelledLinear(x, weight, None, swapped, node)
    return SpelledLinear(x, weight, _added(addition, node), swapped, addition)


def spelled_linear(graph: CapturedGraph, node: Node) -> SpelledLinear | None:
    """The linear that a node computes in any spelling; None for a node that computes none."""
    if node.op == "call_module":
        return _match_module(graph, node)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in LINEARS:
        x, weight = captured_argument(node, 0, "input"), captured_argument(node, 1, "weight")
        return SpelledLinear(x, weight, captured_argument(node, 2, "bias"), False, node)
    if node.target in ADDMMS:
        return _match_addmm(graph, node)
    if node.target in PRODUCTS:
        return _match_product(graph, node)
    return None
