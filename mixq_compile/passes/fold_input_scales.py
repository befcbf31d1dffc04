"""`fold-input-scales`: the division by equalizing factors moves into what makes the value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.without_data import has_data
from mixq_compile.ops.operands import operand
from mixq_compile.passes._input_groups import derive_weight, derived, need_store
from mixq_compile.passes._obstacles import Obstacle
from mixq_compile.passes._scale_sources import Part, find
from mixq_compile.pipeline import Decision, Pass, PassContext

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldInputScales(Pass):
    """Moves what `equalize-inputs` multiplies values by into norms, or into the linears before.

    Only where everything that reads the value is equalized by the same factors: a decision names what
    forbids it. The parameters stay as they are; what takes the factors is derived from them.
    """

    name: ClassVar[str] = "fold-input-scales"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical-linears", "equalized-inputs"})

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each value that is multiplied."""
        for node in graph.walk(aten.mul.Tensor):
            view = Annotations(node)
            inverse = graph.tensor(operand(node, "other"))
            if view.equalized is None or inverse is None:
                continue
            readers = [Annotations(reader).fqn or reader.name for reader in node.users]
            value: Node = operand(node, "self")
            found = find(graph, value, _factors(inverse), node)
            if isinstance(found, Obstacle):
                details = {"linears": readers, **found.details}
                yield Decision.skipped(node, f"stays: {found.reason}", fqn=view.fqn, details=details)
                continue
            names = [graph.parameter_name(part.parameter) for part in found]
            yield Decision.applied(
                node,
                f"folded into {', '.join(names)}",
                fqn=view.fqn,
                details={"linears": readers, "into": names},
            )
            self._fold(graph, need_store(self.name, context), found)
            graph.replace(node, value)

    def _fold(self, graph: CapturedGraph, store: Any, parts: Sequence[Part]) -> None:
        for part in parts:
            if part.member is not None:
                derive_weight(graph, store, part.member, part.steps[-1], "folded")
            else:
                new = derived(graph, store, part.parameter, part.steps, "folded")
                part.reader.replace_input_with(part.source, new)


def _factors(inverse: Tensor) -> Tensor:
    """The factors as numbers; ones where there are only shapes."""
    return inverse if has_data(inverse) else torch.ones(len(inverse), dtype=torch.float32, device="cpu")
