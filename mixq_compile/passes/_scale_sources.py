"""Where a factor for each channel of a value can go instead: into the parameters of what makes the value.

The search goes back from the value. At each step it knows the factors in the shape of the value at hand,
with size 1 where they do not differ, and which node reads it: a value that something else reads too must
not change. Nothing is known of architectures.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.activation_functions import activation_function
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.captured_calls import captured_argument, captured_rest, times_read
from mixq_compile.ir.effects import is_in_place
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.linears import SWAPS
from mixq_compile.ir.shapes import hint_of
from mixq_compile.ops.operands import operand
from mixq_compile.passes._input_groups import Member, member_of
from mixq_compile.passes._obstacles import Obstacle
from mixq_compile.weights.steps.step import Cast, Scaled, Shifted

aten, functional = torch.ops.aten, torch.nn.functional
LAYER_NORMS = (functional.layer_norm, torch.layer_norm, aten.layer_norm.default)
RMS_NORMS = (functional.rms_norm, torch.rms_norm, aten.rms_norm.default)
PRODUCTS = (operator.mul, torch.mul, aten.mul.Tensor, "mul")
SUMS = (operator.add, torch.add, aten.add.Tensor, "add")
CASTS = (
    *("to", "float", "half", "bfloat16", "type_as", "type"),
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default, aten._to_copy.default),
)
SAME = (
    *("contiguous", "clone", "detach", torch.clone, torch.detach),
    *(aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default),
)
RESHAPES = (
    *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"),
    *(torch.reshape, torch.flatten, torch.unflatten, torch.unsqueeze, torch.squeeze),
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
    *(aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim),
)
EXPANDS = ("expand", aten.expand.default)
ATTENTIONS = (functional.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
MATMULS = (operator.matmul, torch.matmul, torch.bmm, aten.matmul.default, aten.bmm.default, "matmul", "bmm")
SPLITS = (
    *("split", "chunk", torch.split, torch.chunk),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
)


@dataclass(frozen=True)
class Part:
    """One parameter that takes the factors: an operand of a call that is replaced."""

    reader: Node
    """The call whose operand it is."""
    source: Node
    """The operand: the parameter, or what the model's code computes from it."""
    parameter: Node
    steps: tuple[Any, ...]
    member: Member | None = None
    """For the weight of a linear."""


Found = list[Part] | Obstacle


def find(graph: CapturedGraph, value: Node, factors: Tensor, reader: Node) -> Found:
    """The parameters that take the factors `[K]` of a value's last dimension, or why none does.

    `reader` is the node that multiplies the value by them now.
    """
    shape = [1] * (graph.value(value).dim() - 1) + [len(factors)]
    return _Search(graph).into(value, factors.float().cpu().reshape(shape), reader)


def _target(node: Node) -> str:
    """The function of a node as a reason names it."""
    name = getattr(node.target, "__name__", str(node.target))
    return name.removeprefix("aten.")


def readers_listed(graph: CapturedGraph, nodes: Iterable[Node]) -> str:
    """Nodes with the layers that they belong to."""
    names = []
    for node in dict.fromkeys(nodes):
        fqn = Annotations(node).fqn or graph.fqn(node)
        names.append(f"{node.name} ({fqn})" if fqn else node.name)
    return ", ".join(names)


class _Search:
    def __init__(self, graph: CapturedGraph) -> None:
        self.graph = graph

    def into(self, value: Node, factors: Tensor, reader: Node) -> Found:
        """The parts that multiply a value, which `reader` alone reads, by factors of its rank."""
        others = [node for node in value.users if node is not reader and not self.graph.is_dead(node)]
        if others:
            what = f"{value.name} is also read by {readers_listed(self.graph, others)}"
            return Obstacle(what, tuple(node.name for node in others))
        if times_read(reader, value) != 1:
            return self._refused(reader, f"{reader.name} reads {value.name} twice")
        if value.op not in ("call_function", "call_method"):
            return self._refused(value, f"{value.name} is not computed in this graph")
        if is_in_place(value):
            return self._refused(value, f"{value.name} writes its argument in place")
        return self._rule(value)(value, factors)

    def _rule(self, node: Node) -> Callable[[Node, Tensor], Found]:
        target = node.target
        rules: tuple[tuple[tuple[Any, ...], Callable[[Node, Tensor], Found]], ...] = (
            ((aten.linear.default,), self._linear),
            (LAYER_NORMS, self._layer_norm),
            (RMS_NORMS, self._rms_norm),
            (PRODUCTS, self._product),
            ((*CASTS, *SAME), self._through),
            (RESHAPES, self._reshape),
            (SWAPS, self._permute),
            (EXPANDS, self._expand),
            (ATTENTIONS, self._attention),
            (MATMULS, self._matmul),
            ((operator.getitem,), self._item),
        )
        if activation_function(node) == "relu" or target == "relu":
            return self._through  # relu(a * x) = a * relu(x) for a > 0
        return next((rule for targets, rule in rules if target in targets), self._unknown)

    def _refused(self, node: Node, why: str) -> Obstacle:
        return Obstacle(why, (node.name,))

    def _unknown(self, node: Node, factors: Tensor) -> Found:
        return self._refused(
            node, f"{node.name} ({_target(node)}) does not pass on a factor for each channel"
        )

    def _shape(self, node: Node) -> list[Any]:
        return list(self.graph.value(node).shape)

    def _only_last(self, factors: Tensor) -> bool:
        return factors.numel() == factors.shape[-1]

    # Parameters --------------------------------------------------------------------------------

    def _vector(self, reader: Node, source: Any, factors: Tensor) -> Part | None:
        """The part for an operand that is a parameter `[K]`, or that is computed from one alone."""
        steps: list[Any] = []
        node = source
        while isinstance(node, Node) and self.graph.tensor(node) is None:
            value = self.graph.value(node)
            if node.target in CASTS:
                steps.insert(0, Cast(value.dtype))
                node = captured_argument(node, 0, "self")
            elif node.target in SUMS:
                terms = captured_argument(node, 0, "input"), captured_argument(node, 1, "other")
                numbers = [term for term in terms if isinstance(term, (int, float))]
                sources = [term for term in terms if isinstance(term, Node)]
                if len(numbers) != 1 or len(sources) != 1 or len(captured_rest(node, 2, "alpha")) > 0:
                    return None
                steps[:0] = [Shifted(float(numbers[0])), Cast(value.dtype)]
                node = sources[0]
            else:
                return None
        tensor = self.graph.tensor(node)
        if tensor is None or tensor.shape != (factors.shape[-1],) or not self._only_last(factors):
            return None
        if not tensor.is_floating_point():
            return None
        return Part(reader, source, node, (*steps, Scaled(0, factors.flatten())))

    def _norm(self, node: Node, factors: Tensor, operands: dict[str, int]) -> Found:
        parts = []
        for name, place in operands.items():
            source = captured_argument(node, place, name)
            if source is None and name == "bias":
                continue
            part = self._vector(node, source, factors) if isinstance(source, Node) else None
            if part is None:
                return self._refused(node, f"{node.name} ({_target(node)}) has no {name} of its own to scale")
            parts.append(part)
        return parts

    def _layer_norm(self, node: Node, factors: Tensor) -> Found:
        return self._norm(node, factors, {"weight": 2, "bias": 3})

    def _rms_norm(self, node: Node, factors: Tensor) -> Found:
        return self._norm(node, factors, {"weight": 2})

    def _linear(self, node: Node, factors: Tensor) -> Found:
        member = member_of(self.graph, node)
        if member is None or not self._only_last(factors):
            return self._refused(node, f"the weight of {node.name} is computed, not a parameter")
        rows = Scaled(1 - member.input_dim, factors.flatten())
        parts = [Part(node, operand(node, "weight"), member.parameter, (rows,), member)]
        bias = operand(node, "bias")
        if bias is not None:
            part = self._vector(node, bias, factors)
            if part is None:
                return self._refused(bias, f"the bias of {node.name} is computed, not a parameter")
            parts.append(part)
        return parts

    # Values ------------------------------------------------------------------------------------

    def _product(self, node: Node, factors: Tensor) -> Found:
        """Into one factor of a product: a parameter if there is one, else whichever takes it."""
        terms = [captured_argument(node, 0, "input"), captured_argument(node, 1, "other")]
        nodes = [term for term in terms if isinstance(term, Node)]
        for term in nodes:
            part = self._vector(node, term, factors)
            if part is not None:
                return [part]
        reasons: list[Obstacle] = []
        for term in nodes:
            shape = self._shape(term) if isinstance(self.graph.value(term), Tensor) else []
            if len(shape) != factors.dim() or any(
                size != 1 and held != size for size, held in zip(factors.shape, shape, strict=True)
            ):
                continue
            found = self.into(term, factors, node)
            if isinstance(found, list):
                return found
            reasons.append(found)
        if not reasons:
            return self._unknown(node, factors)
        blamed = tuple(name for reason in reasons for name in reason.blamed)
        return Obstacle("; ".join(reason.reason for reason in reasons), blamed)

    def _through(self, node: Node, factors: Tensor) -> Found:
        source = captured_argument(node, 0, "input" if node.target not in CASTS else "self")
        return self.into(source, factors, node)

    def _reshape(self, node: Node, factors: Tensor) -> Found:
        source = captured_argument(node, 0, "input")
        before = reshaped(factors, self._shape(node), self._shape(source))
        if before is None:
            return self._refused(node, f"{node.name} mixes the channels with a size that is not fixed")
        return self.into(source, before, node)

    def _permute(self, node: Node, factors: Tensor) -> Found:
        source, rank = captured_argument(node, 0, "input"), factors.dim()
        axes = list(captured_rest(node, 1, "dims"))
        if not axes or any(not isinstance(axis, int) for axis in axes):
            return self._unknown(node, factors)
        if node.target in SWAPS[:3]:
            first, second = (axis % rank for axis in axes)
            return self.into(source, factors.transpose(first, second), node)
        places = [axis % rank for axis in axes]
        return self.into(source, factors.permute(sorted(range(rank), key=places.__getitem__)), node)

    def _expand(self, node: Node, factors: Tensor) -> Found:
        source = captured_argument(node, 0, "input")
        shape = self._shape(source)
        added = factors.dim() - len(shape)
        sizes = zip(factors.shape, [1] * added + shape, strict=True)
        if any(size != 1 and held != size for size, held in sizes):
            return self._refused(
                node, f"{node.name} repeats channels whose factors differ, as shared heads do"
            )
        return self.into(source, factors.reshape(factors.shape[added:]), node)

    def _attention(self, node: Node, factors: Tensor) -> Found:
        return self._mixes_rows(node, captured_argument(node, 2, "value"), factors)

    def _matmul(self, node: Node, factors: Tensor) -> Found:
        name = "other" if node.target not in (torch.bmm, aten.bmm.default, "bmm") else "mat2"
        return self._mixes_rows(node, captured_argument(node, 1, name), factors)

    def _mixes_rows(self, node: Node, matrix: Any, factors: Tensor) -> Found:
        """Into the right factor of a matrix product: its rows are mixed, its columns and heads are not."""
        shape = self._shape(matrix) if isinstance(matrix, Node) else []
        if len(shape) != factors.dim() or len(shape) < 2 or factors.shape[-2] != 1:
            return self._unknown(node, factors)
        if any(size != 1 and held != size for size, held in zip(factors.shape, shape, strict=True)):
            return self._refused(node, f"{node.name} shares heads among queries whose factors differ")
        return self.into(matrix, factors, node)

    def _item(self, node: Node, factors: Tensor) -> Found:
        """Into a part of what a split gives, whose other parts keep what they are."""
        whole, index = captured_argument(node, 0, "self"), captured_argument(node, 1, "index")
        if not isinstance(whole, Node) or whole.target not in SPLITS or not isinstance(index, int):
            return self._unknown(node, factors)
        parts, rank = self.graph.value(whole), factors.dim()
        if not isinstance(parts, (tuple, list)):
            return self._unknown(node, factors)
        index %= len(parts)
        dim = captured_argument(whole, 2, "dim", 0) % rank
        again = [
            reader
            for reader in whole.users
            if reader is not node
            and (reader.target is not operator.getitem or not self._reads_another(reader, index, len(parts)))
        ]
        if again:
            what = f"{node.name} is also read by {readers_listed(self.graph, again)}"
            return Obstacle(what, tuple(reader.name for reader in again))
        pieces = []
        for place, part in enumerate(parts):
            size = part.shape[dim]
            shape = list(factors.shape)
            shape[dim] = size
            if not isinstance(size, int):
                return self._unknown(node, factors)
            pieces.append(factors.expand(shape) if place == index else torch.ones_like(factors).expand(shape))
        source = captured_argument(whole, 0, "input")
        return self.into(source, torch.cat([piece.contiguous() for piece in pieces], dim), whole)

    def _reads_another(self, reader: Node, index: int, count: int) -> bool:
        place = captured_argument(reader, 1, "index")
        return isinstance(place, int) and place % count != index


def _alike(first: Any, second: Any) -> bool:
    if isinstance(first, int) and isinstance(second, int):
        return first == second
    if isinstance(first, torch.SymInt) and isinstance(second, torch.SymInt):
        return bool(first.node.expr == second.node.expr)
    return False


def reshaped(factors: Tensor, after: list[Any], before: list[Any]) -> Tensor | None:
    """The factors of a value before a reshape; None where sizes that are not fixed stand in the way.

    Args:
        factors: of the reshaped value, with size 1 where they do not differ.
        after: the shape of the reshaped value; its sizes may be symbolic, as those of `before`.
    """
    head = 0
    while (
        head < min(len(after), len(before)) and factors.shape[head] == 1 and _alike(after[head], before[head])
    ):
        head += 1
    tail = 0
    while tail < min(len(after), len(before)) - head and _alike(after[-1 - tail], before[-1 - tail]):
        tail += 1
    kept = list(factors.shape[len(after) - tail :])
    inner, outer = after[head : len(after) - tail], before[head : len(before) - tail]
    middle = list(factors.shape[head : len(after) - tail])
    if all(size == 1 for size in middle):
        return factors.reshape([1] * len(before[: len(before) - tail]) + kept)
    if any(not isinstance(size, int) for size in inner):
        # Sizes that are not fixed may stay aside where the factors do not depend on them.
        hints = [hint_of(size) for size in (*inner, *outer)]
        if any(hint is None for hint in hints):
            return None
    whole = factors.reshape([*middle, *kept]).expand([*(hint_of(size) or 1 for size in inner), *kept])
    result = whole.reshape([*(hint_of(size) or 1 for size in outer), *kept])
    for place, size in enumerate(outer):
        first = result.narrow(place, 0, 1)
        if torch.equal(first.expand_as(result), result):
            result = first
        elif not isinstance(size, int):
            return None
    return result.reshape([1] * head + list(result.shape))
