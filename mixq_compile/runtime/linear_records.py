"""Reads from a rewritten graph what became of each of its linears."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.captured_calls import captured_argument
from mixq_compile.ir.effects import is_region
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.linears import features_of
from mixq_compile.ir.shapes import hint_of
from mixq_compile.ops.operands import operand, operands, producer
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.traits import traits_of
from mixq_compile.runtime.compilation import LinearRecord
from mixq_compile.runtime.weight_store import STORE
from mixq_compile.scheme import QuantScheme
from mixq_compile.weights.recipe import keeps_columns, outliers_from_codes

aten, mixq = torch.ops.aten, torch.ops.mixq


def is_product(node: Node) -> bool:
    """True for the call that computes one or several quantized linears."""
    traits = traits_of(node.target)
    return traits is not None and traits.product


def _quantization_of(product: Node) -> Node | None:
    """The node that makes a product's codes; None for a weight-only one."""
    return producer(operands(product).get("codes"))


def _state_of(graph: CapturedGraph, quantized: Node, weight: Tensor) -> OutlierState | None:
    index = graph.tensor(operand(quantized, "index"))
    return next((state for state in STORE.states([weight]) if state.index is index), None)


def _outlier_weight_source(
    graph: CapturedGraph, product: Node, quantized: Node, linear: dict[str, Any]
) -> str | None:
    """Where a product's outlier weights come from; None where it has no outlier slots."""
    codes: Node = operand(product, "codes")
    refresh = next(
        (user for user in codes.users if user.target is mixq.refresh_outlier_weights.default), None
    )
    if refresh is None:
        return None
    scheme = linear.get("parameters")
    if scheme is not None and outliers_from_codes((chosen := QuantScheme.from_json(scheme)).recipe):
        fixed = chosen.outliers is not None and keeps_columns(chosen.recipe, chosen.outliers.miss)
        return "solved" if fixed else "codes"
    kept = all(graph.value(node).numel() for node in operand(refresh, "original"))
    return "original" if kept or quantized.target is mixq.quantize.default else "codes"


def _weight_of(graph: CapturedGraph, node: Node) -> Any:
    """The weight of a linear that stayed as it was, in whatever spelling it was captured."""
    if node.target is aten.linear.default:
        return operand(node, "weight")
    readers = Annotations(node).readers
    named = (source for source in graph.graph.nodes if readers and source.name == readers[0])
    return next(named, None) or captured_argument(node, 1, "weight")


def _features(graph: CapturedGraph, node: Node, weight: Tensor | None) -> tuple[int, int]:
    """Outputs and inputs of a linear."""
    forms = STORE.forms(weight) if weight is not None else []
    codes = [codes for form in forms for codes in STORE.codes(form)]
    if weight is not None and codes:
        rows, columns = weight.shape
        return (columns, rows) if codes[0].key.transposed else (rows, columns)
    if weight is not None and node.target is not aten.linear.default:
        return hint_of(weight.shape[-2]) or 0, hint_of(weight.shape[-1]) or 0
    values = (graph.value(_weight_of(graph, node)), graph.value(node))
    matrix, result = ([hint_of(size) or 0 for size in getattr(value, "shape", ())] for value in values)
    return features_of(matrix, result)


def _members(node: Node) -> list[dict[str, Any]]:
    """The annotations of each linear that a product of quantized ones stands for; empty for other nodes."""
    if not is_product(node):
        return []
    view = Annotations(node)
    return [member for member in view.members or [view.to_json()] if member.get("readers") is not None]


def linear_records(graph: CapturedGraph) -> list[LinearRecord]:
    """One record for each linear of the graph, quantized or not, in order."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found = []
    for node in graph.graph.nodes:
        view = Annotations(node)
        for member in _members(node):
            weight = graph.tensor(nodes[member.get("parameter") or member["readers"][0]])
            found.append(_record(graph, node, member, weight, view.kernel))
        if is_region(node):
            for member in view.members or ():
                weight = graph.tensor(nodes[member["readers"][0]]) if member["readers"] else None
                found.append(_record(graph, node, member, weight, None))
        elif node.target is aten.linear.default:
            weight = graph.tensor(graph.weight_parameter(_weight_of(graph, node)))
            weight = STORE.derived.parameter(weight) if weight is not None else None
            found.append(_record(graph, node, view.to_json(), weight, view.kernel))
        elif view.skip is not None:
            found.append(_record(graph, node, view.to_json(), None, view.kernel))
    return found


def _record(
    graph: CapturedGraph, node: Node, linear: dict[str, Any], weight: Tensor | None, kernel: str | None
) -> LinearRecord:
    """What became of one linear, from its annotations and the node that computes it."""
    quantized = is_product(node)
    features = _features(graph, node, weight)
    quantization = _quantization_of(node) if quantized else None
    state = (
        _state_of(graph, quantization, weight) if quantization is not None and weight is not None else None
    )
    return LinearRecord(
        fqn=linear.get("fqn") or graph.fqn(node),
        role=linear.get("role") or "other",
        out_features=features[0],
        in_features=features[1],
        scheme=linear.get("scheme") if quantized else None,
        kernel=kernel,
        skip=None if quantized else linear.get("skip") or "no pass looked at it",
        outlier_weight_source=_outlier_weight_source(graph, node, quantization, linear)
        if quantization is not None
        else None,
        float_bytes=weight.nbytes if weight is not None else 0,
        weight=weakref.ref(weight) if weight is not None else None,
        state=weakref.ref(state) if state is not None else None,
    )
