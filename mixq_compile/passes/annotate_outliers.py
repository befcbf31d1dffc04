"""`annotate-outliers`: writes calibrated outlier columns onto the linears that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from mixq_compile.ir.annotations import annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import Decision, Pass, PassContext
from mixq_compile.scheme import OutlierPolicy


@dataclass(frozen=True)
class AnnotateOutliers(Pass):
    """Chooses outlier columns from calibration statistics; without statistics it changes nothing."""

    name: ClassVar[str] = "annotate-outliers"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical-linears"})

    stats: str | None = None
    """sha256 of the statistics in the pass context: two pipelines over other statistics differ."""
    threshold: float = 6.0
    """Columns whose calibrated maximum is above this are outlier columns."""
    capacity: int | None = None
    """Most columns of one linear; of more, the largest are taken."""
    choose: str = "threshold"
    """threshold: the columns above it; largest: as many as there are slots, the largest first."""

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each linear with statistics."""
        if context.stats is None:
            return
        policy = OutlierPolicy(self.threshold, self.capacity)
        for node in graph.graph.nodes:
            if node.target is not torch.ops.aten.linear.default:
                continue
            view = annotations(node)
            in_features = graph.value(node.args[0]).shape[-1]
            found = context.stats.find(view.fqn or "")
            if found is None:
                yield Decision.skipped(node, "not in the statistics: columns are found online", fqn=view.fqn)
                continue
            slots = policy.capacity_for(in_features)
            columns = context.stats.outlier_columns(
                view.fqn, threshold=None if self.choose == "largest" else self.threshold, count=slots
            )
            largest = float(found.absmax.max())
            reason = (
                f"{len(columns)} of {in_features} columns, {self.choose}; the largest reaches {largest:.3g}"
            )
            yield Decision.applied(node, reason, fqn=view.fqn, details={"columns": columns})
            view.outlier_columns = columns
            view.absmax = [float(found.absmax[column]) for column in columns]
