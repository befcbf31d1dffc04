"""The nodes of one quantized linear, the same from whichever pass writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops import composition
from mixq_compile.ops.providers import AUTO

Write = Callable[[Any, Mapping[str, Any]], Node]
"""`write(operator, operands)` makes a node."""


@dataclass(frozen=True)
class MixedLinear:
    """One quantized linear: its operands, as nodes, and what is known of its outliers."""

    operands: Mapping[str, Node | str | None]
    """x, the weight's and the state's, by the names that `ops.composition` lists."""
    format: str
    """Of the activation's codes, as text."""
    policy: dict[str, Any] | None
    """The outlier policy as JSON; None: no outlier columns are kept."""
    columns: list[int] | None
    """Outlier columns known from calibration."""
    small_m: int

    def write(self, graph: CapturedGraph, write: Write) -> Node:
        """Quantize, refresh, mixed_gemm and dequantize at the insertion point; returns the last.

        Raises OptionError where one of the operands belongs to none of them.
        """

        def call(step: composition.Step, given: Mapping[str, Any]) -> Any:
            node = write(step.operator, step.signature.select(given))
            if step.traits.quantizes is not None:
                view = Annotations(node)
                view.policy, view.outlier_columns = self.policy, self.columns
            return tuple(graph.result(node, name) for name in step.traits.results) or node

        composition.check_taken(self.operands)
        given: composition.Given = {
            **self.operands,
            "format": self.format,
            "small_m": self.small_m,
            "kernel": AUTO,
        }
        given["miss"] = self.policy["miss"] if self.policy else composition.STATIC
        result: Node = composition.compose(given, call, refreshes=self.policy is not None, fused=False)
        return result


def write_weight_only(operands: Mapping[str, Node | str | None], write: Write) -> Node:
    """The node of a linear whose input stays as it is; of the operands it takes x and the weight's."""
    composition.check_taken(operands)

    def call(step: composition.Step, given: Mapping[str, Any]) -> Node:
        return write(step.operator, step.signature.select(given))

    result: Node = composition.weight_only({**operands, "kernel": AUTO}, call)
    return result
