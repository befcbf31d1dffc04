"""Operands and results by name: read from the schema, rewritten by name, and wrong names refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from mixq_compile import ops
from mixq_compile.errors import OptionError, PipelineError
from mixq_compile.ir.captured_calls import captured_argument
from mixq_compile.ops.operands import (
    given_operands,
    listed_operands,
    operand,
    operands,
    operands_for,
    operands_without_place,
    producer,
    result,
    result_place,
    results,
    set_operands,
    signature_of,
)
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.ops.providers import operators
from mixq_compile.ops.traits import declare, traits_of

aten, mixq = torch.ops.aten, torch.ops.mixq
OPERATORS = sorted(name for name in dir(ops) if getattr(mixq, name, None) is not None and name[0].islower())


def call(target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call whose texts among the arguments are inputs of those names."""
    graph = Graph()
    inputs = {text: graph.placeholder(text) for text in (*args, *kwargs.values()) if isinstance(text, str)}

    def given(argument: Any) -> Any:
        return inputs.get(argument, argument) if isinstance(argument, str) else argument

    return graph.call_function(
        target, tuple(given(each) for each in args), {name: given(each) for name, each in kwargs.items()}
    )


def names(values: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "name", value) for name, value in values.items()}


class TestOperands:
    def test_in_order_and_by_name_are_the_same(self) -> None:
        for node in (
            call(aten.linear.default, "x", "w", "b"),
            call(aten.linear.default, "x", bias="b", weight="w"),
        ):
            assert names(operands(node)) == {"input": "x", "weight": "w", "bias": "b"}
            assert operand(node, "bias").name == "b"

    def test_what_is_not_given_has_its_default(self) -> None:
        node = call(aten.slice.Tensor, "x", 1)
        assert names(operands(node)) == {"self": "x", "dim": 1, "start": None, "end": None, "step": 1}
        assert names(given_operands(node)) == {"self": "x", "dim": 1}
        assert operand(node, "step") == 1

    def test_keyword_only_operands_have_names_too(self) -> None:
        node = call(aten.addmm.default, "b", "x", "w", beta=2)
        assert names(operands(node)) == {"self": "b", "mat1": "x", "mat2": "w", "beta": 2, "alpha": 1}

    def test_an_unknown_name_lists_the_valid_ones(self) -> None:
        node = call(aten.linear.default, "x", "w")
        expected = (
            "unknown operand of aten::linear 'wieght'. Did you mean 'weight'? Valid: bias, input, weight."
        )
        for ask in (lambda: operand(node, "wieght"), lambda: set_operands(node, wieght=None)):
            with pytest.raises(OptionError) as caught:
                ask()
            assert str(caught.value) == expected

    def test_too_many_operands_are_refused(self) -> None:
        with pytest.raises(PipelineError, match="4 operands in order, but it takes 3: input, weight, bias"):
            operands(call(aten.linear.default, "x", "w", "b", "c"))

    def test_a_target_without_a_schema_says_so(self) -> None:
        with pytest.raises(PipelineError, match=r"no operator with a schema.*captured_argument"):
            operands(call(torch.nn.functional.silu, "x"))


class TestRewriting:
    def test_one_operand_changes_and_the_others_stay(self) -> None:
        node = call(mixq.weight_only_linear.default, "x", "codes", "scale", None, "kernel")
        x = operand(node, "x")
        set_operands(node, weight_scale=x)
        assert [getattr(each, "name", each) for each in node.args] == ["x", "codes", "x", None, "kernel"]
        assert node.kwargs == {}
        assert node in x.users

    def test_defaults_are_written_only_where_one_behind_them_is_given(self) -> None:
        node = call(aten.slice.Tensor, "x", 1)
        set_operands(node, end=7)
        assert node.args[1:] == (1, None, 7)
        node = call(aten.slice.Tensor, "x", 1)
        set_operands(node, dim=2)
        assert node.args[1:] == (2,)

    def test_keyword_only_operands_stay_by_name(self) -> None:
        args, kwargs = signature_of(aten.addmm.default).arrange({"mat1": 1, "self": 0, "mat2": 2, "alpha": 3})
        assert (args, kwargs) == ((0, 1, 2), {"alpha": 3})

    def test_a_missing_operand_is_an_error_although_it_may_be_none(self) -> None:
        """A bias that was forgotten would be a silent wrong result."""
        with pytest.raises(
            PipelineError, match=r"mixq::weight_only_linear lacks bias: .* It takes x, weight_codes"
        ):
            signature_of(mixq.weight_only_linear.default).arrange(
                {"x": 0, "weight_codes": 1, "weight_scale": 2, "kernel": "auto"}
            )


class TestResults:
    def test_results_have_names(self) -> None:
        node = call(
            mixq.mixed_gemm.default, "codes", "outliers", "count", "weight_codes", "outlier_weight", "auto"
        )
        graph = node.graph
        second = graph.call_function(__import__("operator").getitem, (node, 1))
        assert results(node) == [("outlier_product", second)]
        assert result(node, "outlier_product") is second
        assert result(node, "accumulator") is None
        assert producer(second) is node
        assert producer(node) is None
        assert producer(None) is None

    def test_an_unknown_result_lists_the_valid_ones(self) -> None:
        with pytest.raises(
            OptionError, match=r"unknown result of mixq.quantize.default 'count'.*codes, outliers, scale"
        ):
            result_place(mixq.quantize.default, "count")


class TestTraits:
    @pytest.mark.parametrize("name", OPERATORS)
    def test_every_operator_has_traits(self, name: str) -> None:
        overload = getattr(mixq, name).default
        traits = traits_of(overload)
        assert traits is not None
        assert traits.name == name
        assert traits_of(f"mixq.{name}.default") is traits, "a printed program names it so"
        assert traits.composite == (name not in operators())

    def test_products_and_what_they_are_made_of(self) -> None:
        found = {name: traits_of(getattr(mixq, name).default) for name in OPERATORS}
        products = {name for name, traits in found.items() if traits is not None and traits.product}
        assert products == {
            "mixed_gemm", "mixed_linear", "activated_linear", "quantized_linear", "weight_only_linear",
            "grouped_linear",
        }  # fmt: skip
        # Joining moves codes, scales and outlier weights, but no zero points and no addends yet.
        # A gated product's rows are halves of a whole: laid below another's they would be multiplied wrongly.
        joined = {name for name, traits in found.items() if traits is not None and traits.joins}
        assert joined == {"mixed_linear", "weight_only_linear"}

    @pytest.mark.parametrize("name", OPERATORS)
    def test_state_operands_stand_for_buffers_of_a_state(self, name: str) -> None:
        overload = getattr(mixq, name).default
        traits = traits_of(overload)
        assert traits is not None
        assert set(traits.state.values()) <= set(STATE_FIELDS)
        written = {
            argument.name
            for argument in overload._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        caches = {"state", "cache"} if name == "linear" else {"cached_index", "outlier_weight"}
        assert written <= {*traits.state, *caches}, "a written operand is no state"

    def test_listed_operands_are_those_that_the_schema_lists(self) -> None:
        for name in OPERATORS:
            overload = getattr(mixq, name).default
            traits = traits_of(overload)
            listed = {each.name for each in overload._schema.arguments if str(each.type) == "List[Tensor]"}
            assert traits is not None
            # The lists of a whole linear hold parts of one, as its recipe says.
            assert set(traits.each) == (set() if name == "linear" else listed), name

    def test_an_operator_without_lists_lists_nothing(self) -> None:
        assert listed_operands(call(aten.linear.default, "x", "w")) == {}

    @pytest.mark.parametrize(
        ("traits", "message"),
        [
            ({"rows": ("weihgt_codes",)}, "name weihgt_codes, but its operands are x, weight_codes"),
            ({"source": "codes"}, "name codes, but"),
            ({"quantizes": "y"}, "name y, but"),
            ({"state": {"counters": "counters"}}, "name counters, but"),
            ({"results": ("first", "second")}, "name 2 results of 1"),
        ],
    )
    def test_traits_that_the_schema_contradicts_are_refused(
        self, traits: dict[str, Any], message: str
    ) -> None:
        before = traits_of(mixq.weight_only_linear.default)
        with pytest.raises(PipelineError, match=message):
            declare(ops.weight_only_linear, **traits)
        assert traits_of(mixq.weight_only_linear.default) is before


def test_a_captured_call_gives_what_the_code_wrote_in_order_or_by_name() -> None:
    for node in (call(torch.addmm, "b", "x", "w"), call(torch.addmm, "b", mat2="w", mat1="x")):
        assert captured_argument(node, 1, "mat1").name == "x"
        assert captured_argument(node, 2, "mat2").name == "w"
    assert captured_argument(call(torch.addmm, "b", "x", "w"), 3, "beta", 1) == 1


class TestInPlaceOfAnother:
    """A fused operator takes the operands of those that it replaces, and loses none unseen."""

    def test_what_both_have_is_carried_over(self) -> None:
        node = call(mixq.weight_only_linear.default, "x", "codes", "scale", "b", "auto")
        assert names(operands_for(aten.linear.default, node)) == {"bias": "b"}

    def test_what_the_other_lacks_is_named(self) -> None:
        node = call(mixq.weight_only_linear.default, "x", "codes", "scale", "b", "auto")
        assert operands_without_place(mixq.mixed_linear.default, node) == ()
        lost = ("x", "weight_codes", "weight_scale", "kernel")
        assert operands_without_place(aten.linear.default, node) == lost
        assert operands_without_place(aten.linear.default, node, {"x", "kernel"}) == lost[1:3]

    def test_a_default_does_not_matter_however_it_is_given(self) -> None:
        for given, lost in (({}, ()), ({"beta": 1}, ()), ({"beta": 2}, ("beta",))):
            node = call(aten.addmm.default, "b", "x", "w", **given)
            assert operands_without_place(aten.linear.default, node, {"self", "mat1", "mat2"}) == lost
