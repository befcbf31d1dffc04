"""What passes claim of a graph is looked up in the graph: a pass that lies is named, with fact and node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from linear_models import captured, network
from rewriting import CHOSEN, FUSED, MIXED, NAMED, WHOLE
from torch.fx import Node

import mixq_compile as mixq
from mixq_compile.errors import ContractError, OptionError, PipelineError
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.operands import set_operands
from mixq_compile.pipeline import (
    Decision,
    Fuel,
    Pass,
    PassContext,
    PassVerificationError,
    Pipeline,
    fact,
    get_pass,
    pass_names,
)
from mixq_compile.pipeline.facts import declared_facts, fact_named
from mixq_compile.runtime.weight_store import WeightStore

aten, ops = torch.ops.aten, torch.ops.mixq
Act = Callable[[CapturedGraph], None]


def nothing(graph: CapturedGraph) -> None:
    """What a pass does that claims the work of another."""


def liar(fact_name: str, act: Act, invalidates: tuple[str, ...] = ()) -> Pass:
    """A pass that does something, and says that it establishes a fact."""

    @dataclass(frozen=True)
    class Liar(Pass):
        name: ClassVar[str] = "liar"
        establishes: ClassVar[frozenset[str]] = frozenset({fact_name} if fact_name else ())

        def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
            act(graph)
            yield from ()

    Liar.invalidates = frozenset(invalidates)
    return Liar()


def run(text: str, *more: Pass, graph: CapturedGraph | None = None, **options) -> None:  # type: ignore[no-untyped-def]
    passes = (*(Pipeline.parse(text).passes if text else ()), *more)
    graph = graph or captured(network(), "export")
    Pipeline(passes).run(graph, PassContext(weights=WeightStore(), **options), verify="full")


def first(graph: CapturedGraph, operator: object) -> Node:
    return next(graph.walk(operator))


def spell_otherwise(graph: CapturedGraph) -> None:
    node = first(graph, aten.linear.default)
    with graph.graph.inserting_before(node):
        turned = graph.call(aten.t.default, (node.args[1],), like=node)
        product = graph.call(aten.matmul.default, (node.args[0], turned), like=node)
    Annotations(product).role = None
    graph.replace(node, product)


def forget_role(graph: CapturedGraph) -> None:
    Annotations(first(graph, aten.linear.default)).role = None


def forget_scheme(graph: CapturedGraph) -> None:
    Annotations(first(graph, aten.linear.default)).update({"scheme": None, "parameters": None})


def rename_scheme(graph: CapturedGraph) -> None:
    Annotations(first(graph, aten.linear.default)).scheme = "w4a4o16"


def spoil_scheme(graph: CapturedGraph) -> None:
    Annotations(first(graph, aten.linear.default)).parameters = {"name": "w8a8o16"}


def multiply_other_codes(graph: CapturedGraph) -> None:
    node = first(graph, ops.mixed_gemm.default)
    codes = graph.value(node.args[0])
    with graph.graph.inserting_before(node):
        made = graph.call(aten.zeros.default, ([*codes.shape],), like=node)
        made = graph.call(aten.to.dtype, (made, codes.dtype), like=node)
    set_operands(node, codes=made)


def multiply_input(graph: CapturedGraph) -> None:
    node = first(graph, aten.linear.default)
    factors = graph.attach("factors", torch.full((graph.value(node.args[0]).shape[-1],), 2.0))
    with graph.graph.inserting_before(node):
        multiplied = graph.call(aten.mul.Tensor, (node.args[0], factors), like=node)
    Annotations(multiplied).equalized = str(factors.target)
    set_operands(node, input=multiplied)


def name_provider(name: str) -> Act:
    def act(graph: CapturedGraph) -> None:
        set_operands(first(graph, ops.mixed_linear.default), kernel=name)

    return act


LIES = [
    ("canonical-linears", "", nothing, "attn.k_proj", "it is a linear, and has no role"),
    ("canonical-linears", NAMED, spell_otherwise, "attn.k_proj", "it is a linear, and spelled aten.matmul"),
    ("canonical-linears", NAMED, forget_role, "attn.k_proj", "it is a linear, and has no role"),
    ("schemes", NAMED, nothing, "attn.k_proj", "it has neither a scheme nor a reason to stay as it is"),
    ("schemes", CHOSEN, forget_scheme, "attn.k_proj", "it has neither a scheme nor a reason"),
    ("schemes", CHOSEN, rename_scheme, "attn.k_proj", "its scheme is named w4a4o16, and its parameters"),
    ("schemes", CHOSEN, spoil_scheme, "attn.k_proj", "its scheme cannot be read"),
    (
        "equalized-inputs",
        CHOSEN,
        multiply_input,
        "attn.k_proj",
        "its input is multiplied by factors, and its",
    ),
    ("mixed-linears", CHOSEN, nothing, "attn.k_proj", "it has the scheme w8a8o16, and is still a linear"),
    ("mixed-linears", MIXED, multiply_other_codes, "attn.k_proj", "the codes that it multiplies are no"),
    ("fused-linears", MIXED, nothing, "attn.k_proj", "nothing else reads its product mixed_gemm"),
    ("kernels", FUSED, nothing, "attn.k_proj", "its provider is not chosen"),
    ("kernels", WHOLE, name_provider("cuda"), "attn.k_proj", "it names the provider 'cuda', which has no"),
    (
        "kernels",
        WHOLE,
        name_provider("cpu"),
        "attn.k_proj",
        "its provider is cpu, and its annotation says ref",
    ),
]


@pytest.mark.parametrize(
    ("name", "text", "act", "layer", "why"), LIES, ids=[f"{lie[0]}: {lie[4]}" for lie in LIES]
)
def test_a_pass_that_lies_is_caught(name: str, text: str, act: Act, layer: str, why: str) -> None:
    with pytest.raises(PassVerificationError) as caught:
        run(text, liar(name, act))
    message = str(caught.value)
    place = len(Pipeline.parse(text)) + 1 if text else 1
    assert message.startswith(f"pass {place}, liar, left a graph that does not hold"), message
    assert (
        f"the fact {name!r} ({fact_named(name).meaning}): liar establishes it, and it is not so: {why}"
        in message
    )
    assert "\n  node: " in message
    assert f"  layer: {layer}" in message, message
    assert caught.value.record.violations, "the record of the run must carry the findings"


def test_a_product_that_a_pass_writes_is_no_linear_of_the_model() -> None:
    """Such as the rotation of an input: it has a role, so that no later pass takes it for a linear."""

    def rotate(graph: CapturedGraph) -> None:
        node = first(graph, aten.linear.default)
        rotation = graph.attach("rotation", torch.eye(graph.value(node.args[0]).shape[-1]))
        with graph.graph.inserting_before(node):
            turned = graph.call(aten.matmul.default, (node.args[0], rotation), like=node)
        set_operands(node, input=turned)

    run(NAMED, liar("canonical-linears", rotate))


def test_a_whole_operator_is_no_mixed_linear() -> None:
    graph = captured(mixq.quantize(network()), "export")
    with pytest.raises(PassVerificationError, match="it is not so: mixq::linear is still whole"):
        run("strip-guards", liar("mixed-linears", nothing), graph=graph)


def test_every_fact_of_this_package_has_a_lie_here() -> None:
    named = {name for each in pass_names() for name in get_pass(each).establishes | get_pass(each).requires}
    assert named == {lie[0] for lie in LIES}


def test_a_later_pass_that_breaks_a_fact_is_caught() -> None:
    with pytest.raises(PassVerificationError) as caught:
        run(CHOSEN, liar("", forget_scheme))
    claim = "pass 3, select-scheme, established it, and liar neither keeps nor invalidates it: it has neither"
    assert claim in str(caught.value)
    assert str(caught.value).startswith("pass 4, liar,")


def test_a_pass_may_break_what_it_invalidates() -> None:
    run(CHOSEN, liar("", forget_scheme, invalidates=("schemes",)))


def test_a_fact_that_was_invalidated_can_be_established_again() -> None:
    undo = liar("", forget_scheme, invalidates=("schemes",))
    run(CHOSEN, undo, *Pipeline.parse("select-scheme{force=true}").passes)
    with pytest.raises(PassVerificationError, match="liar establishes it"):
        run(CHOSEN, undo, liar("schemes", nothing))


def test_only_full_verification_looks() -> None:
    graph = captured(network(), "export")
    Pipeline((liar("schemes", nothing),)).run(graph, verify="incremental")


def test_a_pipeline_cut_short_by_its_fuel_claims_nothing() -> None:
    """Each number of rewrites leaves a graph in which some claims cannot hold yet: none is a lie."""
    fuel = Fuel()
    run(WHOLE, fuel=fuel)
    assert fuel.spent > 20
    for rewrites in range(fuel.spent):
        run(WHOLE, fuel=Fuel(rewrites))


@pytest.mark.parametrize("kind", ["requires", "establishes", "invalidates"])
def test_a_fact_that_nothing_declares_is_refused(kind: str) -> None:
    step = liar("", nothing)
    setattr(type(step), kind, frozenset({"canonical-linear"}))
    with pytest.raises(ContractError) as caught:
        Pipeline((step,)).build(established=("canonical-linear",))
    message = str(caught.value)
    assert message.startswith(
        "pass 1, liar: unknown fact 'canonical-linear'. Did you mean 'canonical-linears'?"
    )
    assert "mixq_compile.pipeline.fact" in message


def test_a_fact_of_ones_own_is_checked_as_those_of_this_package_are() -> None:
    @fact("no-sigmoid", "nothing is a sigmoid")
    def no_sigmoid(graph: CapturedGraph) -> Iterator[tuple[Node, str]]:
        yield from ((node, "it is one") for node in graph.walk(aten.sigmoid.default))

    with pytest.raises(
        PassVerificationError, match=r"'no-sigmoid'.*liar establishes it, and it is not so: it is one"
    ):
        run("", liar("no-sigmoid", nothing))


def test_two_declarations_of_a_fact_are_refused() -> None:
    with pytest.raises(PipelineError, match="the fact 'schemes' is declared twice: by mixq_compile"):
        fact("schemes", "something else")(lambda graph: iter(()))
    assert fact_named("schemes").meaning.startswith("each linear has a scheme")


def test_an_unknown_fact_lists_those_there_are() -> None:
    with pytest.raises(OptionError, match=r"unknown fact 'scheme'\. Did you mean 'schemes'"):
        fact_named("scheme")
    assert {"canonical-linears", "fused-linears", "kernels", "mixed-linears", "schemes"} <= set(
        declared_facts()
    )
