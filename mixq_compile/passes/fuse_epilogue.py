"""`fuse-epilogue`: mixed_gemm and dequantize, with its bias, become one `mixed_linear`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.operands import operand, operands_for, producer
from mixq_compile.ops.traits import traits_of
from mixq_compile.passes._obstacles import Obstacle, no_place_for_operands, other_readers
from mixq_compile.pipeline import Decision, Pass, PassContext

mixq = torch.ops.mixq
FUSED = mixq.mixed_linear.default
PRODUCTS = ("accumulator", "outlier_product")
"""What dequantize takes of the product, and the product returns."""


@dataclass(frozen=True)
class FuseEpilogue(Pass):
    """Fuses each dequantize with the product it reads, where nothing else reads that product."""

    name: ClassVar[str] = "fuse-epilogue"
    requires: ClassVar[frozenset[str]] = frozenset({"mixed-linears"})
    establishes: ClassVar[frozenset[str]] = frozenset({"fused-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each dequantize."""
        for node in graph.walk(mixq.dequantize.default):
            fqn = Annotations(node).fqn
            found = _operands_of_both(node)
            if isinstance(found, Obstacle):
                yield Decision.skipped(node, found.reason, fqn=fqn, details=found.details)
                continue
            yield Decision.applied(node, "dequantize and bias go into the product's kernel", fqn=fqn)
            halves = [operand(node, name) for name in PRODUCTS]
            product = producer(halves[0])
            with graph.graph.inserting_before(node):
                fused = graph.call(FUSED, found, like=node)
            graph.replace(node, fused)
            for dead in (*halves, product):
                graph.graph.erase_node(dead)


def _operands_of_both(node: Node) -> dict[str, object] | Obstacle:
    """The operands of the `mixed_linear` that a dequantize ends, or why it ends none."""
    halves = [operand(node, name) for name in PRODUCTS]
    product = producer(halves[0])
    if product is None or product.target is not mixq.mixed_gemm.default:
        return Obstacle.of("what it reads is no result of mixed_gemm", [halves[0]])
    if producer(halves[1]) is not product:
        return Obstacle.of("its operands are results of two products", [product, halves[1]])
    obstacle = other_readers("the product", [product, *halves], {*halves, node})
    obstacle = obstacle or no_place_for_operands(FUSED, product)
    obstacle = obstacle or no_place_for_operands(FUSED, node, PRODUCTS)
    if obstacle is not None:
        return obstacle
    quantized = producer(operand(product, "codes"))
    traits = traits_of(quantized.target) if quantized is not None else None
    if quantized is None or traits is None or traits.quantizes is None:
        what = "its codes are no result of a quantization, whose small_m it must have"
        return Obstacle.of(what, [operand(product, "codes")])
    taken = {**operands_for(FUSED, product), **operands_for(FUSED, node)}
    return {**taken, "small_m": operand(quantized, "small_m")}
