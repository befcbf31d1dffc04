"""Reads from a rewritten graph what became of each of its linears."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.annotations import annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.linears import transposed_source
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.runtime.compilation import LinearRecord
from mixq_compile.runtime.weight_store import STORE

mixq = torch.ops.mixq
QUANTIZATIONS = (mixq.quantize.default, mixq.quantize_online.default)
PRODUCTS = {mixq.mixed_linear.default: 1, mixq.mixed_gemm.default: 0, mixq.weight_only_linear.default: None}
"""Where a product takes its codes; None where it takes none."""


def _state_of(graph: CapturedGraph, product: Node, weight: Tensor) -> tuple[OutlierState | None, bool]:
    """The outlier state behind a product, and whether its outlier weights come from the 16-bit weight."""
    place = PRODUCTS[product.target]  # type: ignore[index]
    if place is None:
        return None, False
    codes = product.args[place]
    assert isinstance(codes, Node)
    quantized = codes.args[0]
    assert isinstance(quantized, Node)
    index = graph.tensor(quantized.args[1])  # type: ignore[arg-type]
    state = next((state for state in STORE.states([weight]) if state.index is index), None)
    refresh = next(
        (user for user in codes.users if user.target is mixq.refresh_outlier_weights.default), None
    )
    if refresh is None:
        return state, True
    originals = [graph.value(node) for node in refresh.args[7]]  # type: ignore[union-attr]
    return state, all(value.numel() > 0 for value in originals)


def linear_records(graph: CapturedGraph) -> list[LinearRecord]:
    """One record for each linear of the graph, quantized or not, in order."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found = []
    for node in graph.graph.nodes:
        view = annotations(node)
        if node.target is torch.ops.aten.linear.default:
            matrix = node.args[1]
            parameter = transposed_source(matrix) or matrix
        elif node.target in PRODUCTS and view.readers:
            parameter = nodes[view.readers[0]]
        else:
            continue
        weight = graph.tensor(parameter)
        if weight is None:
            continue
        rows, columns = weight.shape
        swapped = parameter is not (
            node.args[1] if node.target is torch.ops.aten.linear.default else parameter
        )
        skipped = node.target is torch.ops.aten.linear.default
        state, from_original = (None, False) if skipped else _state_of(graph, node, weight)
        packed = next(iter(STORE.packed(weight)), None)
        if packed is not None and packed.transposed:
            swapped = True
        found.append(
            LinearRecord(
                fqn=view.fqn or graph.fqn(node),
                role=view.role or "other",
                out_features=columns if swapped else rows,
                in_features=rows if swapped else columns,
                scheme=None if skipped else view.scheme,
                kernel=view.kernel,
                skip=view.skip if skipped else None,
                outlier_source=None if state is None else "original" if from_original else "codes",
                float_bytes=weight.numel() * weight.element_size(),
                weight=weakref.ref(weight),
                state=weakref.ref(state) if state is not None else None,
            )
        )
    return found
