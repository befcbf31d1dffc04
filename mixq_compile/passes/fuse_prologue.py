"""`fuse-prologue`: a norm or an activation function and the quantization of its result in one operator."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.effects import is_written_between
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.shapes import hint_of, row_count
from mixq_compile.ops import providers
from mixq_compile.passes.select_scheme import LARGE_BATCH
from mixq_compile.pipeline import Decision, Pass, PassContext

aten, mixq, functional = torch.ops.aten, torch.ops.mixq, torch.nn.functional

ADD = (operator.add, torch.add, "add", aten.add.Tensor, aten.add.Scalar)
CAST = ("to", "float", "type_as", aten.to.dtype, aten._to_copy.default)
LAYER_NORM = (functional.layer_norm, aten.layer_norm.default)
MEAN = ("mean", torch.mean, aten.mean.dim)
MULTIPLY = (operator.mul, torch.mul, "mul", aten.mul.Tensor)
POWER = ("pow", torch.pow, operator.pow, aten.pow.Tensor_Scalar)
RSQRT = ("rsqrt", torch.rsqrt, aten.rsqrt.default)
SILU = (functional.silu, aten.silu.default)
GELU = (functional.gelu, aten.gelu.default)
STATE_BUFFERS = 5


@dataclass(frozen=True)
class Prologue:
    """What makes a value: an operator that does it together with the quantization, and its arguments."""

    operator: Any
    inputs: tuple[Any, ...]
    """The arguments before the outlier state."""
    settings: tuple[Any, ...]
    """The arguments between the state and bits."""
    nodes: tuple[Node, ...] = field(repr=False)
    """The nodes of which it consists; the last is the value."""

    @property
    def what(self) -> str:
        """The producer, as decisions name it."""
        return str(self.settings[-1])


@dataclass(frozen=True)
class FusePrologue(Pass):
    """Computes a norm, or an activation function with its gate, in the kernel that quantizes the result."""

    name: ClassVar[str] = "fuse-prologue"
    requires: ClassVar[frozenset[str]] = frozenset({"fused-linears"})

    when: Literal["auto", "always", "never"] = "auto"
    """Where the provider's figures say that one kernel beats two; wherever it is possible; or not at all."""
    kernel: str = "auto"
    """The provider that is asked."""

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each quantization that learns columns."""
        for node in graph.walk(mixq.quantize_online.default):
            value: Node = node.args[0]  # type: ignore[assignment]
            found = norm_of(graph, value) or activation_of(graph, value)
            reason = "what makes its value is no norm or activation function that has a kernel"
            why_not = reason if found is None else self._why_not(graph, node, found)
            if found is None or why_not is not None:
                yield Decision.skipped(node, why_not or reason)
                continue
            yield Decision.applied(node, f"{found.what} and the quantization of its result become one")
            _fuse(graph, node, found)

    def _why_not(self, graph: CapturedGraph, quantized: Node, found: Prologue) -> str | None:
        if self.when == "never":
            return "turned off"
        if any(isinstance(setting, Node) for setting in found.settings):
            return "the norm's epsilon is an input of the graph, as dynamic=True makes numbers"
        if self.when == "auto" and (reason := self._why_no_gain(graph, found)) is not None:
            return reason
        return _why_order_matters(graph, quantized, found)

    def _why_no_gain(self, graph: CapturedGraph, found: Prologue) -> str | None:
        name = str(found.operator).split(".")[1]
        x = graph.value(found.inputs[0])
        query = providers.KernelQuery(name, x.device, x.dtype, in_features=hint_of(x.shape[-1]))
        known = {entry.name: entry for entry in providers.providers_of(name)}
        chosen = known.get(self.kernel) or providers.rejections(query)[0]
        if chosen is None or chosen.name == "ref":
            return f"no kernel does both on {x.device.type}"
        fixed, traced = row_count(x)
        rows = fixed or traced or LARGE_BATCH
        speedup = chosen.speedup(query, rows) if chosen.speedup is not None else None
        if speedup is None:
            return f"it was not measured whether one kernel beats two with {chosen.name}"
        return None if speedup >= 1.0 else f"not faster with {chosen.name}: {speedup:.2f}x at {rows} rows"


def _made_by(node: Any, targets: Sequence[Any]) -> bool:
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in targets


def _either(node: Node) -> list[tuple[Any, Any]]:
    """The two operands of a product, in both orders."""
    left, right = node.args[:2]
    return [(left, right), (right, left)]


def _is_row(graph: CapturedGraph, node: Any, like: Tensor) -> bool:
    """True for a parameter `[K]` of the dtype of a value `[..., K]`."""
    tensor = graph.tensor(node)
    return tensor is not None and tensor.dim() == 1 and tensor.dtype == like.dtype


def norm_of(graph: CapturedGraph, value: Node) -> Prologue | None:
    """The norm that makes a value: torch's layer norm, or the RMS norm as transformers writes it."""
    result = graph.value(value)
    if _made_by(value, LAYER_NORM):
        given: dict[str, Any] = {"weight": None, "bias": None, "eps": 1e-5, **value.kwargs}
        given |= dict(zip(("x", "normalized_shape", "weight", "bias", "eps"), value.args, strict=False))
        x, weight, bias = given.get("x"), given["weight"], given["bias"]
        rows = [row for row in (weight, bias) if row is not None]
        fits = weight is not None and all(_is_row(graph, row, result) for row in rows)
        if not fits or len(given["normalized_shape"]) != 1 or not isinstance(x, Node):
            return None
        inputs = (x, weight, bias)
        return Prologue(mixq.norm_quantize.default, inputs, (given["eps"], "layer"), (value,))
    if not _made_by(value, MULTIPLY):
        return None
    for weight, rounded in _either(value):
        if isinstance(rounded, Node) and _is_row(graph, weight, result):
            found = _rms_norm(graph, rounded)
            if found is not None and graph.value(rounded).dtype == result.dtype:
                x, epsilon, nodes = found
                settings = (epsilon, "rms")
                return Prologue(mixq.norm_quantize.default, (x, weight, None), settings, (*nodes, value))
    return None


def _rms_norm(graph: CapturedGraph, rounded: Node) -> tuple[Node, Any, tuple[Node, ...]] | None:
    """x, epsilon and the nodes of `(h * rsqrt(mean(h ** 2) + epsilon)).to(x.dtype)`, h being x in fp32.

    The last conversion is missing where T5 runs in fp32.
    """
    product: Any = rounded.args[0] if _made_by(rounded, CAST) else rounded
    if not _made_by(product, MULTIPLY):
        return None
    for values, scale in _either(product):
        if not _made_by(scale, RSQRT) or not _made_by(scale.args[0], ADD):
            continue
        shifted: Node = scale.args[0]
        mean, epsilon = shifted.args[:2]
        if not _made_by(mean, MEAN) or not _made_by(mean.args[0], POWER):  # type: ignore[union-attr]
            continue
        power: Node = mean.args[0]  # type: ignore[assignment,union-attr]
        wide, exponent = power.args[:2]
        if exponent != 2 or not _made_by(wide, CAST) or not _is_mean_of_rows(mean):  # type: ignore[arg-type]
            continue
        x: Any = wide.args[0]  # type: ignore[union-attr]
        # T5 multiplies x itself, which is then converted on the way.
        if values not in (wide, x) or graph.value(wide).dtype != torch.float32:
            continue
        if graph.value(x).dtype == graph.value(rounded).dtype:
            inner = dict.fromkeys((wide, power, mean, shifted, scale, product, rounded))
            return x, epsilon, tuple(inner)  # type: ignore[arg-type]
    return None


def _is_mean_of_rows(mean: Node) -> bool:
    axes = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
    keeps = mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim")
    return axes in (-1, [-1], (-1,)) and keeps is True and mean.kwargs.get("dtype") is None


def _function_of(node: Any) -> str | None:
    """Which activation function a call is, as the operator names it; None for any other."""
    if _made_by(node, SILU) and not node.kwargs.get("inplace") and not any(node.args[1:]):
        return "silu"
    if _made_by(node, GELU):
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return None


def activation_of(graph: CapturedGraph, value: Node) -> Prologue | None:
    """The activation function, or its product with a value of the same shape, that makes a value."""
    fused = mixq.activation_quantize.default
    function = _function_of(value)
    if function is not None:
        return Prologue(fused, (value.args[0], None), (function,), (value,))
    if not _made_by(value, MULTIPLY):
        return None
    for activated, factor in _either(value):
        function = _function_of(activated)
        one, other = graph.value(activated), graph.value(factor)
        if function is None or not isinstance(other, Tensor):
            continue
        sizes = [[hint_of(size) for size in tensor.shape] for tensor in (one, other)]
        if one.dtype == other.dtype and sizes[0] == sizes[1]:
            return Prologue(fused, (activated.args[0], factor), (function,), (activated, value))
    return None


def _why_order_matters(graph: CapturedGraph, quantized: Node, found: Prologue) -> str | None:
    """Why the quantization cannot happen where its value is made; None where it can."""
    value, state = found.nodes[-1], quantized.args[1 : 1 + STATE_BUFFERS]
    place = {node: number for number, node in enumerate(graph.graph.nodes)}
    first = min(found.nodes, key=place.__getitem__)
    inputs = [node for node in found.inputs if node is not None]
    if any(is_written_between(node, first, value) for node in inputs):
        return "what the value is made from is changed in place meanwhile"
    if is_written_between(value, value.next, quantized):
        return "the value is changed in place before it is quantized"
    if any(place[node] > place[value] for node in state):  # type: ignore[index]
        return "its outlier state is made after the value"
    node = value
    while (node := node.next) is not quantized:
        if not set(node.all_input_nodes).isdisjoint(state):
            return "its outlier state is used before the value is quantized"
    return None


def _fuse(graph: CapturedGraph, quantized: Node, found: Prologue) -> None:
    """One operator where the value was made; of its results the first is the value."""
    _, *state_and_rest = quantized.args
    state, rest = state_and_rest[:STATE_BUFFERS], state_and_rest[STATE_BUFFERS:]
    value = found.nodes[-1]
    items = list(quantized.users)
    with graph.graph.inserting_before(value):
        arguments = (*found.inputs, *state, *found.settings, *rest)
        fused = graph.call(found.operator, arguments, like=quantized)
        produced = graph.getitem(fused, 0)
    graph.replace(value, produced)
    for item in items:
        item.args = (fused, int(item.args[1]) + 1)  # type: ignore[arg-type]
    graph.graph.erase_node(quantized)
    for node in reversed(found.nodes[:-1]):
        if not node.users:
            graph.graph.erase_node(node)
