"""The linears that read one value, and giving them another value and derived weights: for several passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.errors import PipelineError
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.roles import LM_HEAD, ROUTER
from mixq_compile.ops.operands import operand, set_operands
from mixq_compile.passes._obstacles import Obstacle, written_between
from mixq_compile.pipeline import PassContext

aten = torch.ops.aten
NOT_QUANTIZED = "none of the linears that read the value is to be quantized"
NO_STORE = "{name} derives weights, and this run has no store for them: give PassContext a `weights`."


@dataclass(frozen=True)
class Member:
    """One linear, and the parameter behind its weight."""

    linear: Node
    parameter: Node
    tensor: Tensor
    """The parameter itself, `[N, K]`, or `[K, N]` as GPT-2's Conv1D has it."""

    @property
    def input_dim(self) -> int:
        """The parameter's dimension of input channels."""
        return 1 if self.parameter is operand(self.linear, "weight") else 0

    @property
    def fqn(self) -> str:
        """The linear's name."""
        return Annotations(self.linear).fqn or ""

    @property
    def is_wanted(self) -> bool:
        """False for a linear that stays in 16 or 32 bit whatever its input, as far as passes have decided."""
        view = Annotations(self.linear)
        return view.skip is None and view.role not in (LM_HEAD, ROUTER)


@dataclass(frozen=True)
class InputGroup:
    """All linears that read one value and whose weights are parameters of its dtype."""

    value: Node
    members: tuple[Member, ...]

    @property
    def first(self) -> Node:
        """The first of the linears."""
        return self.members[0].linear

    @property
    def names(self) -> list[str]:
        """The linears' names."""
        return [member.fqn for member in self.members]

    def obstacle(self) -> Obstacle | None:
        """Why the group stays as it is: none is quantized, or its value is written between its readers."""
        if not any(member.is_wanted for member in self.members):
            return Obstacle(NOT_QUANTIZED)
        return written_between(self.value, self.first, self.members[-1].linear, "the linears that read it")


def member_of(graph: CapturedGraph, linear: Node) -> Member | None:
    """A linear with its parameter; None where its weight is computed, or of another dtype than its input."""
    parameter = graph.weight_parameter(operand(linear, "weight"))
    tensor, x = graph.tensor(parameter), graph.value(operand(linear, "input"))
    if parameter is None or tensor is None or tensor.dim() != 2 or tensor.dtype != x.dtype:
        return None
    return Member(linear, parameter, tensor)


def input_groups(graph: CapturedGraph) -> list[InputGroup]:
    """The groups of a graph, in order."""
    found: dict[Node, list[Member]] = defaultdict(list)
    for linear in graph.walk(aten.linear.default):
        member = member_of(graph, linear)
        if member is not None:
            found[operand(linear, "input")].append(member)
    return [InputGroup(value, tuple(members)) for value, members in found.items()]


def need_store(name: str, context: PassContext) -> Any:
    """The store of weights. Raises PipelineError where the run has none."""
    if context.weights is None:
        raise PipelineError(NO_STORE.format(name=name))
    return context.weights


def derived(graph: CapturedGraph, store: Any, parameter: Node, steps: Sequence[Any], what: str) -> Node:
    """A node for a parameter after more steps; `what` ends its name."""
    tensor = store.derive(graph.tensor(parameter), *steps)
    return graph.attach(f"{graph.parameter_name(parameter)}.{what}", tensor)


def derive_weight(graph: CapturedGraph, store: Any, member: Member, step: Any, what: str) -> None:
    """Gives a linear its weight after one more step, in the layout of its parameter."""
    linear, view = member.linear, Annotations(member.linear)
    weight = derived(graph, store, member.parameter, [step], what)
    if member.input_dim == 0:
        before = operand(linear, "weight")
        with graph.graph.inserting_before(linear):
            weight = graph.call(aten.t.default, {"self": weight}, like=before)
    set_operands(linear, weight=weight)
    view.parameter = view.parameter or member.parameter.name


def feed(group: InputGroup, value: Node) -> None:
    """Lets the linears of a group read another value."""
    for member in group.members:
        set_operands(member.linear, input=value)


def annotated(fqn: str, **values: Any) -> dict[str, Any]:
    """The `custom` metadata of a node that stands before linears and is none itself."""
    return {"mixq": {"fqn": fqn, **values}}


def with_others(names: list[str]) -> Iterator[str]:
    """`, with k_proj, v_proj` for the linears of a group beside the first."""
    if len(names) > 1:
        yield f"with {', '.join(name.rpartition('.')[2] for name in names[1:])}"
