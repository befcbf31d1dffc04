"""`annotate-outliers`: writes calibrated outlier columns onto the linears that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.without_data import has_data
from mixq_compile.ops.operands import operand
from mixq_compile.pipeline import Decision, Pass, PassContext
from mixq_compile.scheme import QuantScheme

CHANGED = "its input was {how} after calibration, so that its maxima are not known: {rest}"


def calibrated_columns(
    stats: Any, fqn: str, scheme: QuantScheme, in_features: int, inverse: Tensor | None = None
) -> tuple[list[int], list[float]] | None:
    """The outlier columns of a linear by its statistics, and their maxima; None where it has none.

    `inverse` is what each channel is multiplied by since calibration, `[K]`. With 8-bit activations the
    columns above the threshold, and at most as many as there are slots;
    with 4-bit ones always as many, the largest first.
    """
    policy = scheme.outliers
    found = stats.find(fqn)
    if policy is None or scheme.activation is None or found is None:
        return None
    if inverse is not None:
        # A channel's maximum is scaled as the channel is: the factors are positive.
        found = dataclasses.replace(found, absmax=found.absmax * inverse.float().cpu())
        stats = dataclasses.replace(stats, linears={fqn: found}, never_run=())
    threshold = policy.threshold if scheme.activation.bits == 8 else None
    columns = stats.outlier_columns(fqn, threshold=threshold, count=policy.capacity_for(in_features))
    return columns, [float(found.absmax[column]) for column in columns]


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
            inverse, how = self._since_calibration(graph, node)
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
            view.outlier_columns, view.absmax = columns, maxima

    def _since_calibration(self, graph: CapturedGraph, node: Node) -> tuple[Tensor | None, str | None]:
        """What a linear's input is multiplied by, and what else was done to it that no maximum survives."""
        view = Annotations(node)
        if view.rotated is not None:
            return None, "rotated"
        if view.equalized is None:
            return None, None
        inverse = graph.attribute(view.equalized)
        if not isinstance(inverse, Tensor) or not has_data(inverse):
            return None, "equalized by factors that this run does not know"
        return inverse, None

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
