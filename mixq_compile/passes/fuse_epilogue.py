"""`fuse-epilogue`: mixed_gemm and dequantize, with its bias, become one `mixed_linear`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import Decision, Pass, PassContext

mixq = torch.ops.mixq


def _small_m(codes: Any) -> int:
    """The switch point of the quantize node behind its codes: both must agree."""
    quantized: Node = codes.args[0]
    switch_point: Any = quantized.args[-2]
    return int(switch_point)


@dataclass(frozen=True)
class FuseEpilogue(Pass):
    """Fuses each dequantize with the product it reads, where nothing else reads that product."""

    name: ClassVar[str] = "fuse-epilogue"
    requires: ClassVar[frozenset[str]] = frozenset({"mixed-linears"})
    establishes: ClassVar[frozenset[str]] = frozenset({"fused-linears"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each dequantize."""
        for node in graph.walk(mixq.dequantize.default):
            arguments: tuple[Any, ...] = node.args
            x, accumulator, outlier_product, scale, weight_scale, bias, kernel = arguments
            product: Node = accumulator.args[0]
            fqn = Annotations(node).fqn
            if set(product.users) != {accumulator, outlier_product} or len(accumulator.users) > 1:
                yield Decision.skipped(node, "something else reads the product", fqn=fqn)
                continue
            yield Decision.applied(node, "dequantize and bias go into the product's kernel", fqn=fqn)
            codes, outliers, count, weight_codes, outlier_weight, _ = product.args
            with graph.graph.inserting_before(node):
                fused = graph.call(
                    mixq.mixed_linear.default,
                    (
                        x, codes, scale, outliers, count, weight_codes, weight_scale, outlier_weight,
                        bias, _small_m(codes), kernel,
                    ),
                    like=node,
                )  # fmt: skip
            graph.replace(node, fused)
            for dead in (accumulator, outlier_product, product):
                graph.graph.erase_node(dead)
