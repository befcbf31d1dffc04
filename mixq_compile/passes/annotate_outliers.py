"""`annotate-outliers`: writes calibrated outlier columns onto the linears that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.operands import operand
from mixq_compile.passes._input_changes import since_calibration
from mixq_compile.pipeline import Decision, Pass, PassContext
from mixq_compile.scheme import QuantScheme
from mixq_compile.selection.columns import calibrated_columns

CHANGED = "its input was {how} after calibration, so that its maxima are not known: {rest}"


@dataclass(frozen=True)
class AnnotateOutliers(Pass):
    """Chooses outlier columns from calibration statistics; without statistics it changes nothing."""

    name: ClassVar[str] = "annotate-outliers"
    requires: ClassVar[frozenset[str]] = frozenset({"schemes"})

    stats: str | None = None
    """sha256 of the statistics in the pass context: two pipelines over other statistics differ."""

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each linear whose scheme keeps outlier columns."""
        if context.stats is None:
            return
        chosen = self._chosen(graph)
        shapes = {fqn: graph.value(operand(node, "weight")).shape for node, fqn, _ in chosen}
        context.stats.check_model(shapes)
        for node, fqn, scheme in chosen:
            in_features = shapes[fqn][-1]
            online = scheme.outliers is not None and scheme.outliers.miss != "static"
            rest = "columns are found online" if online else "no columns are kept"
            inverse, how = since_calibration(graph, node)
            if how is not None:
                yield Decision.skipped(node, CHANGED.format(how=how, rest=rest), fqn=fqn)
                continue
            found = calibrated_columns(context.stats, fqn, scheme, in_features, inverse)
            if found is None:
                yield Decision.skipped(node, f"it never ran during calibration: {rest}", fqn=fqn)
                continue
            columns, maxima = found
            reason = f"{len(columns)} of {in_features} columns"
            if maxima:
                reason += f", of magnitude {min(maxima):.3g} to {max(maxima):.3g}"
            yield Decision.applied(node, reason, fqn=fqn, details={"columns": columns})
            view = Annotations(node)
            view.outlier_columns, view.column_max = columns, maxima

    def _chosen(self, graph: CapturedGraph) -> list[tuple[Node, str, QuantScheme]]:
        """The linears with a scheme that keeps outlier columns, with their names."""
        found = []
        for node in graph.graph.nodes:
            view = Annotations(node)
            if node.target is torch.ops.aten.linear.default and view.parameters is not None:
                scheme = QuantScheme.from_json(view.parameters)
                if scheme.outliers is not None:
                    found.append((node, view.fqn or "", scheme))
        return found
