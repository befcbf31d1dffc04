"""Facts that passes require, establish and invalidate: what is true of every graph that has each.

`Pass.requires` and `Pass.establishes` name facts; a pipeline is checked against the names before it runs.
With `verify="full"` each fact is also checked against the graph, behind the pass that establishes it and
behind every later one, until a pass invalidates it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from mixq_compile.errors import MixqError, PipelineError, unknown_name
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.effects import is_region
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.linear_spellings import CANONICAL, spelled_linear
from mixq_compile.ir.snapshot import target_name
from mixq_compile.ops.operands import operand, operands_without_place, producer, signature_of
from mixq_compile.ops.providers import AUTO, providers_of
from mixq_compile.ops.traits import traits_of
from mixq_compile.scheme import QuantScheme

Breaches = Iterator[tuple[Node, str]]
"""Each node that a fact does not hold for, and why."""
Predicate = Callable[[CapturedGraph], Breaches]

mixq = torch.ops.mixq


@dataclass(frozen=True)
class Fact:
    """Something that is true of a graph behind a pass."""

    name: str
    """In kebab-case, as passes write it."""
    meaning: str
    """What holds, in one sentence."""
    breaches: Predicate
    """The nodes of a graph for which it does not hold, with why; none where the graph has the fact."""


_FACTS: dict[str, Fact] = {}


def fact(name: str, meaning: str) -> Callable[[Predicate], Predicate]:
    """Declares a fact: decorates the function that yields each node for which it does not hold, and why.

    Raises PipelineError where another function declares it already.
    """

    def declare(breaches: Predicate) -> Predicate:
        known = _FACTS.get(name)
        if known is not None and _home(known.breaches) != _home(breaches):
            raise PipelineError(
                f"the fact {name!r} is declared twice: by {_home(known.breaches)} and by {_home(breaches)}. "
                "Give one of them another name."
            )
        _FACTS[name] = Fact(name, meaning, breaches)
        return breaches

    return declare


def _home(function: Predicate) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def fact_named(name: str) -> Fact:
    """A declared fact. Raises OptionError that lists the declared ones."""
    if name not in _FACTS:
        raise unknown_name("fact", name, _FACTS)
    return _FACTS[name]


def declared_facts() -> tuple[str, ...]:
    """Names of all facts that are declared so far; those of other packages when their passes are imported."""
    return tuple(sorted(_FACTS))


def undeclared(names: Collection[str]) -> list[str]:
    """Those of the names that no fact has, in order."""
    return sorted(name for name in names if name not in _FACTS)


@fact("canonical-linears", "each linear is an aten.linear.default with a role, or says why it is none")
def canonical_linears(graph: CapturedGraph) -> Breaches:
    """Breached by a captured linear in another spelling, and by one without a role.

    A product that a pass wrote, and gave a role so that it is not taken for one of the model's, is none.
    """
    for node in graph.graph.nodes:
        view = Annotations(node)
        if view.skip is not None or is_region(node):
            continue
        if node.target is CANONICAL:
            if view.role is None:
                yield node, "it is a linear, and has no role"
        elif (view.role is None or view.origin is None) and spelled_linear(graph, node) is not None:
            yield node, f"it is a linear, and spelled {target_name(node.target)}"


@fact("schemes", "each linear has a scheme, or the reason why it stays as it is")
def schemes(graph: CapturedGraph) -> Breaches:
    """Breached by a linear with neither, and by one whose scheme cannot be read or has another name."""
    for node in _nodes(graph, CANONICAL):
        view = Annotations(node)
        if view.parameters is None:
            if view.skip is None:
                yield node, "it has neither a scheme nor a reason to stay as it is"
            continue
        try:
            scheme = QuantScheme.from_json(view.parameters)
        except (MixqError, LookupError, TypeError, ValueError) as error:
            yield node, f"its scheme cannot be read: {type(error).__name__}: {error}"
            continue
        if scheme.name != view.scheme:
            yield node, f"its scheme is named {view.scheme}, and its parameters are those of {scheme.name}"


@fact("equalized-inputs", "what multiplies the input of a linear has been divided out of its weight")
def equalized_inputs(graph: CapturedGraph) -> Breaches:
    """Breached by a linear that reads a value times factors `[K]`, and whose weight has others."""
    for node in _nodes(graph, torch.ops.aten.mul.Tensor):
        factors = Annotations(node).equalized
        if factors is None:
            continue
        if str(getattr(operand(node, "other"), "target", "")) != factors:
            yield node, f"it is annotated with the factors {factors}, and multiplies by others"
        for reader in node.users:
            view = Annotations(reader)
            if reader.target is CANONICAL and (view.equalized != factors or view.parameter is None):
                yield reader, f"its input is multiplied by {factors}, and its weight is not derived for that"


@fact("mixed-linears", "each linear with a scheme is a product of codes, with the quantization that it reads")
def mixed_linears(graph: CapturedGraph) -> Breaches:
    """Breached by a linear left whole although it has a scheme, and by codes that nothing quantized."""
    for node in graph.graph.nodes:
        view, traits = Annotations(node), traits_of(node.target)
        if node.target is CANONICAL and view.parameters is not None and view.skip is None:
            yield node, f"it has the scheme {view.scheme}, and is still a linear"
        elif traits is not None and traits.composite:
            yield node, f"mixq::{traits.name} is still whole"
        elif traits is not None and traits.product and "codes" in signature_of(node.target).names:
            maker = producer(operand(node, "codes"))
            made = traits_of(maker.target) if maker is not None else None
            if made is None or "codes" not in made.results:
                yield node, "the codes that it multiplies are no result of a quantization"


@fact("fused-linears", "no product is left that only its own dequantize reads")
def fused_linears(graph: CapturedGraph) -> Breaches:
    """Breached by a dequantize whose product could be joined with it into a `mixed_linear`."""
    for node in _nodes(graph, mixq.dequantize.default):
        halves = [operand(node, name) for name in ("accumulator", "outlier_product")]
        product = producer(halves[0])
        if product is None or product.target is not mixq.mixed_gemm.default:
            continue
        if {*product.users} == {*halves} and all([*half.users] == [node] for half in halves):
            fused = mixq.mixed_linear.default
            kept = (*operands_without_place(fused, product),
                    *operands_without_place(fused, node, ("accumulator", "outlier_product")))  # fmt: skip
            if not kept:
                yield node, f"nothing else reads its product {product.name}, and they are not joined"


@fact("kernels", "each operator of mixq:: names the provider that computes it")
def kernels(graph: CapturedGraph) -> Breaches:
    """Breached by an operator without a provider's name, or with one that it does not have."""
    for node in graph.graph.nodes:
        traits = traits_of(node.target)
        if traits is None or traits.composite:
            continue
        named = operand(node, "kernel")
        if named == AUTO:
            yield node, "its provider is not chosen"
        elif named not in {entry.name for entry in providers_of(traits.name)}:
            yield node, f"it names the provider {named!r}, which has no kernel for mixq::{traits.name}"
        elif Annotations(node).kernel != named:
            yield node, f"its provider is {named}, and its annotation says {Annotations(node).kernel}"


def _nodes(graph: CapturedGraph, target: object) -> list[Node]:
    return [node for node in graph.graph.nodes if node.target is target]
