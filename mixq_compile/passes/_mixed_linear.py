"""The nodes of one quantized linear, the same from whichever pass writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.providers import AUTO

mixq = torch.ops.mixq


@dataclass(frozen=True)
class MixedLinear:
    """The arguments of one quantized linear, as nodes."""

    x: Node
    weight_codes: Node
    weight_scale: Node
    bias: Node | None
    state: tuple[Node, ...]
    """The outlier state's buffers, in the order of STATE_FIELDS."""
    cached_index: Node
    outlier_weight: Node
    original: Node
    """The 16-bit weight, or an empty tensor."""
    bits: int
    policy: dict[str, Any] | None
    """The outlier policy as JSON; None: no outlier columns are kept."""
    columns: list[int] | None
    """Outlier columns known from calibration."""
    small_m: int

    def write(self, graph: CapturedGraph, call: Callable[..., Node]) -> Node:
        """Quantize, refresh, mixed_gemm and dequantize at the insertion point; returns the last.

        `call(operator, *arguments)` makes a node.
        """
        index, column_slot, _, counters, _ = self.state
        tail = (self.small_m, AUTO)
        miss = self.policy["miss"] if self.policy else "static"
        if miss == "static":
            quantized = call(mixq.quantize.default, self.x, index, column_slot, counters, self.bits, *tail)
            codes, scale, outliers = (graph.getitem(quantized, place) for place in range(3))
            count = counters
        else:
            quantized = call(mixq.quantize_online.default, self.x, *self.state, self.bits, miss, *tail)
            codes, scale, outliers, count = (graph.getitem(quantized, place) for place in range(4))
        view = Annotations(quantized)
        view.policy, view.outlier_columns = self.policy, self.columns
        if self.policy:
            call(
                mixq.refresh_outlier_weights.default, codes, index, count, [self.cached_index],
                [self.outlier_weight], [self.weight_codes], [self.weight_scale], [self.original], *tail,
            )  # fmt: skip
        product = call(
            mixq.mixed_gemm.default, codes, outliers, count, self.weight_codes, self.outlier_weight, AUTO
        )
        accumulator, outlier_product = (graph.getitem(product, place) for place in range(2))
        return call(
            mixq.dequantize.default, self.x, accumulator, outlier_product, scale, self.weight_scale,
            self.bias, AUTO,
        )  # fmt: skip
