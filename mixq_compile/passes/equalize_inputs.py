"""`equalize-inputs`: linears read `x / s`, and their weights are multiplied by s (SmoothQuant)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixq_compile.errors import StatisticsError
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.without_data import has_data
from mixq_compile.passes._input_groups import (
    InputGroup,
    annotated,
    derive_weight,
    feed,
    input_groups,
    need_store,
    with_others,
)
from mixq_compile.pipeline import Decision, Pass, PassContext
from mixq_compile.weights.steps.equalize import Equalize
from mixq_compile.weights.steps.step import Scaled

aten = torch.ops.aten
NO_STATISTICS = (
    "equalize-inputs takes its factors from calibrated maxima of the activations, and no statistics were "
    "given: pass stats=mixq_compile.calibrate(model, batches), or leave the pass out of the pipeline."
)
NEVER_RAN = "it never ran during calibration, so that the maxima of its input are not known"
ROTATED = "its input is rotated, and the statistics are those of the value before: equalize first"


@dataclass(frozen=True)
class EqualizeInputs(Pass):
    """Divides each value that linears read by a factor a channel, and multiplies their weights by it.

    Linears that read one value share the factors. Where none of them has a scheme, the value stays as it is:
    put this pass behind `select-scheme`, and before `annotate-outliers` and `rewrite-mixed-linear`.
    """

    name: ClassVar[str] = "equalize-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical-linears"})
    establishes: ClassVar[frozenset[str]] = frozenset({"equalized-inputs"})

    alpha: float = 0.5
    """How much of the difficulty moves into the weights: 0 nothing, 1 all of it."""

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each value that linears read."""
        equalize = Equalize(self.alpha)
        chosen = [group for group in input_groups(graph) if not self._is_done(group)]
        waiting: list[InputGroup] = []
        for group in chosen:
            obstacle = group.obstacle()
            if obstacle is not None:
                yield Decision.skipped(
                    group.first, obstacle.reason, fqn=group.names[0], details=obstacle.details
                )
            else:
                waiting.append(group)
        if not waiting:
            return
        graph.current = waiting[0].first
        if context.stats is None:
            raise StatisticsError(NO_STATISTICS)
        context.stats.check_model(
            {
                member.fqn: member.tensor.shape[member.input_dim]
                for group in waiting
                for member in group.members
                if member.is_wanted
            }
        )
        for group in waiting:
            graph.current = group.first
            views = [Annotations(member.linear) for member in group.members]
            found = [known for name in group.names if (known := context.stats.find(name)) is not None]
            if not found or any(view.rotated is not None for view in views):
                reason = NEVER_RAN if not found else ROTATED
                yield Decision.skipped(group.first, reason, fqn=group.names[0])
                continue
            absmax = torch.stack([each.absmax for each in found]).amax(dim=0)
            inverse = self._inverse(graph, context, group, equalize, absmax)
            yield Decision.applied(
                group.first,
                ", ".join([_described(inverse), *with_others(group.names)]),
                fqn=group.names[0],
                details={"linears": group.names},
            )
            self._rewrite(graph, context, group, inverse)
            for member in group.members[1:]:
                yield Decision.noted(member.linear, f"reads what {group.names[0]} reads", fqn=member.fqn)
        graph.current = None

    def _is_done(self, group: InputGroup) -> bool:
        return all(Annotations(member.linear).equalized is not None for member in group.members)

    def _inverse(
        self,
        graph: CapturedGraph,
        context: PassContext,
        group: InputGroup,
        equalize: Equalize,
        absmax: Tensor,
    ) -> Tensor:
        """What x is multiplied by, `[K]` in its dtype; chosen once for the parameters of the group."""
        x = graph.value(group.value)
        tensors = [member.tensor for member in group.members]
        device = tensors[0].device

        def make() -> Tensor:
            if not all(has_data(tensor) for tensor in tensors):
                return tensors[0].new_empty(len(absmax), dtype=x.dtype)
            with torch.inference_mode(False), torch.no_grad():
                maxima = [
                    member.tensor.detach().abs().amax(dim=1 - member.input_dim).float().cpu()
                    for member in group.members
                ]
                factors = equalize.factors(absmax, torch.stack(maxima).amax(dim=0))
                return (1.0 / factors).to(device, x.dtype)

        content = hashlib.sha256(absmax.contiguous().numpy().tobytes()).hexdigest()
        found: Tensor = need_store(self.name, context).choose(
            tensors, (equalize, content, device, x.dtype), make
        )
        return found

    def _rewrite(
        self, graph: CapturedGraph, context: PassContext, group: InputGroup, inverse: Tensor
    ) -> None:
        first = group.first
        node = graph.attach(f"{group.names[0]}.inverse_factors", inverse)
        with graph.graph.inserting_before(first):
            scaled = graph.call(
                aten.mul.Tensor,
                {"self": group.value, "other": node},
                like=first,
                custom=annotated(group.names[0], equalized=str(node.target)),
            )
        feed(group, scaled)
        for member in group.members:
            derive_weight(graph, context.weights, member, _times(member.input_dim, inverse), "equalized")
            Annotations(member.linear).equalized = str(node.target)


def _times(dim: int, inverse: Tensor) -> Any:
    """The step that undoes, in a weight, what x is multiplied by: exactly, whatever dtype x has."""
    if not has_data(inverse):
        return Scaled(dim, torch.ones(len(inverse), dtype=torch.float32, device="cpu"))
    return Scaled(dim, 1.0 / inverse.float().cpu())


def _described(inverse: Tensor) -> str:
    if not has_data(inverse):
        return f"its {len(inverse)} channels are divided by factors, which depend on the weights"
    factors = 1.0 / inverse.float()
    return (
        f"its {len(inverse)} channels are divided by factors of {float(factors.min()):.3g} to "
        f"{float(factors.max()):.3g}"
    )
