"""`rotate-inputs`: linears read `x · H`, H a Hadamard matrix, and their weights are `W · H`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.roles import OTHER
from mixq_compile.ops.operands import operand
from mixq_compile.passes._input_groups import (
    InputGroup,
    Member,
    annotated,
    derive_weight,
    derived,
    feed,
    input_groups,
    member_of,
    need_store,
    with_others,
)
from mixq_compile.pipeline import Decision, Pass, PassContext
from mixq_compile.weights.steps.rotate import Rotated, Rotation, rotation_of

aten = torch.ops.aten
ODD = "its {channels} channels, an odd number, cannot be rotated"


@dataclass(frozen=True)
class RotateInputs(Pass):
    """Multiplies each value that linears read by an orthonormal Hadamard matrix, and their weights too.

    Where the value is a linear's result that nothing else reads, that linear's rows and bias are rotated
    instead; else the value is, while the model runs: two small products for each row.
    """

    name: ClassVar[str] = "rotate-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical-linears"})

    fold: bool = True
    """Rotate the rows of the linear before, where nothing else reads its result."""

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each value that linears read."""
        for group in input_groups(graph):
            if any(Annotations(member.linear).rotated is not None for member in group.members):
                continue
            graph.current, fqn = group.first, group.names[0]
            obstacle = group.obstacle()
            if obstacle is not None:
                yield Decision.skipped(group.first, obstacle.reason, fqn=fqn, details=obstacle.details)
                continue
            channels = group.members[0].tensor.shape[group.members[0].input_dim]
            rotation = rotation_of(channels)
            if rotation is None:
                yield Decision.skipped(group.first, ODD.format(channels=channels), fqn=fqn)
                continue
            before = self._linear_before(graph, group) if self.fold else None
            where = f"in the rows of {before.fqn}" if before is not None else "while running"
            yield Decision.applied(
                group.first,
                ", ".join([f"{rotation.text}, {where}", *with_others(group.names)]),
                fqn=fqn,
                details={"linears": group.names, "folded": before is not None},
            )
            store = need_store(self.name, context)
            if before is not None:
                self._rotate_rows(graph, store, before)
            else:
                self._rotate_value(graph, group, rotation)
            for member in group.members:
                derive_weight(graph, store, member, Rotated(member.input_dim), "rotated")
                Annotations(member.linear).rotated = rotation.text
            for member in group.members[1:]:
                yield Decision.noted(member.linear, f"reads what {fqn} reads", fqn=member.fqn)
        graph.current = None

    def _linear_before(self, graph: CapturedGraph, group: InputGroup) -> Member | None:
        """The linear whose result the group alone reads, if its weight and bias are parameters; else None."""
        node = group.value
        readers = {member.linear for member in group.members}
        if node.target is not aten.linear.default or not readers.issuperset(node.users):
            return None
        bias = operand(node, "bias")
        if bias is not None and graph.tensor(bias) is None:
            return None
        return member_of(graph, node)

    def _rotate_rows(self, graph: CapturedGraph, store: Any, before: Member) -> None:
        derive_weight(graph, store, before, Rotated(1 - before.input_dim), "rotated")
        bias: Node | None = operand(before.linear, "bias")
        if bias is not None:
            before.linear.replace_input_with(bias, derived(graph, store, bias, [Rotated(0)], "rotated"))

    def _rotate_value(self, graph: CapturedGraph, group: InputGroup, rotation: Rotation) -> None:
        """`x · kron(left, right)` as two products of matrices of about sqrt(K) rows."""
        first, fqn, x = group.first, group.names[0], graph.value(group.value)
        left, right = (
            graph.attach(f"{fqn}.rotation_{name}", matrix.to(x.device, x.dtype).contiguous())
            for name, matrix in (("left", rotation.left.t()), ("right", rotation.right))
        )
        sizes = [len(rotation.left), len(rotation.right)]

        def call(operator: Any, **operands: Any) -> Node:
            # With a role of its own, so that no pass takes the products for linears.
            return graph.call(operator, operands, like=first, custom=annotated(fqn, role=OTHER))

        with graph.graph.inserting_before(first):
            split = call(aten.unflatten.int, self=group.value, dim=-1, sizes=sizes)
            across = call(aten.matmul.default, self=split, other=right)
            both = call(aten.matmul.default, self=left, other=across)
            rotated = call(aten.flatten.using_ints, self=both, start_dim=-2, end_dim=-1)
        feed(group, rotated)
