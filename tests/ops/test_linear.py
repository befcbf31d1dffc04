"""`mixq::linear` equals the composition of the other operators, for every scheme and policy."""

from __future__ import annotations

import copy

import operator_calls
import pytest
import torch
from operator_calls import SHAPES, Shape, Tensors, recipe_of
from torch import Tensor

from mixq_compile.errors import OperandError, OptionError
from mixq_compile.formats import INT4, INT8, TensorFormat
from mixq_compile.ops import (
    linear,
    mixed_linear,
    quantize,
    quantize_online,
    refresh_outlier_weights,
    weight_only_linear,
)
from mixq_compile.ops.linear_recipe import LinearRecipe
from mixq_compile.scheme import WeightRecipe
from mixq_compile.schemes.registry import get_scheme, scheme_names

AUTO = "auto"


def whole(t: Tensors, shape: Shape, bits: int) -> Tensor:
    return linear(  # type: ignore[no-any-return]
        x=t.x,
        bias=t.bias,
        weight=[t.codes, t.scale, t.original],
        state=t.state.buffers(),
        cache=[t.cached_index, t.outlier_weight],
        row_mask=None,
        recipe=str(recipe_of(shape, bits)),
    )


def composed(t: Tensors, shape: Shape, bits: int) -> Tensor:
    state = t.state
    if bits == 16:
        return weight_only_linear(t.x, t.codes, t.scale, t.bias, AUTO)  # type: ignore[no-any-return]
    if shape.miss == "static" or not shape.capacity:
        count = state.counters
        codes, scale, outliers = quantize(
            t.x, state.index, state.column_slot, count, shape.activation, 0, AUTO
        )
    else:
        codes, scale, outliers, count = quantize_online(
            t.x, *state.buffers(), shape.activation, shape.miss, 0, AUTO
        )
    if shape.capacity:
        refresh_outlier_weights(
            codes, state.index, count, [t.cached_index], [t.outlier_weight], [t.codes], [t.scale],
            [t.original], 0, AUTO,
        )  # fmt: skip
    return mixed_linear(  # type: ignore[no-any-return]
        t.x, codes, scale, outliers, count, t.codes, t.scale, t.outlier_weight, t.bias, 0, AUTO
    )


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_composition(name: str) -> None:
    shape = SHAPES[name]
    bits = 16 if name == "weight_only" else shape.activation_bits
    one, other = operator_calls.tensors(shape), operator_calls.tensors(shape)
    for call in range(2):
        found, expected = whole(one, shape, bits), composed(other, shape, bits)
        assert torch.equal(found, expected), f"call {call}"
        for mine, theirs in zip(
            (*one.state.buffers(), one.cached_index, one.outlier_weight),
            (*other.state.buffers(), other.cached_index, other.outlier_weight),
            strict=True,
        ):
            assert torch.equal(mine, theirs), f"state after call {call}"


def test_static_columns_use_their_cached_weights() -> None:
    shape = Shape(columns=(3, 17), miss="static")
    t = operator_calls.tensors(shape)
    found = whole(t, shape, 8)
    assert t.state.columns() == [3, 17]
    exact = t.x @ t.weight.T + t.bias
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.5)


def test_weight_only_takes_no_notice_of_outliers() -> None:
    shape = SHAPES["plain"]
    t = operator_calls.tensors(shape)
    before = copy.deepcopy(t.state)
    whole(t, shape, 16)
    assert all(torch.equal(a, b) for a, b in zip(t.state.buffers(), before.buffers(), strict=True))


@pytest.mark.parametrize("threshold", [6.0, 0.1, 5.0, float("inf")])
@pytest.mark.parametrize("activation", [None, INT4, INT8])
def test_a_recipes_text_round_trips(threshold: float, activation: TensorFormat | None) -> None:
    weight = WeightRecipe(TensorFormat.parse("int4"), "clip")
    for batch_invariant in (False, True):
        recipe = LinearRecipe(weight, activation, "lazy", threshold, batch_invariant)
        assert LinearRecipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize("name", scheme_names())
def test_a_schemes_recipe_says_its_formats_and_policy(name: str) -> None:
    scheme = get_scheme(name)
    recipe = LinearRecipe.parse(str(LinearRecipe.of(scheme, batch_invariant=False)))
    assert (recipe.weight, recipe.activation) == (scheme.recipe, scheme.activation)
    policy = scheme.outliers
    assert (recipe.miss, recipe.threshold) == (
        (policy.miss, policy.threshold) if policy else ("static", float("inf"))
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "weight=int8 absmax; activation=int8",
        "weight=int8 absmax; activation=int8; outliers=exact 6.0; dynamic",
        "weight=int8 guess; activation=int8; outliers=exact 6.0",
        "weight=int8 absmax; activation=float8; outliers=exact 6.0",
        "weight=int8 absmax; activation=int8; outliers=sometimes 6.0",
        "weight=int8 absmax; activation=int8; outliers=exact six",
    ],
)
def test_a_text_that_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        LinearRecipe.parse(text)


@pytest.mark.parametrize("kind", ["weight", "state", "cache"])
def test_lists_hold_what_the_recipe_says(kind: str) -> None:
    shape = SHAPES["plain"]
    t = operator_calls.tensors(shape)
    lists = {
        "weight": [t.codes, t.scale, t.original],
        "state": list(t.state.buffers()),
        "cache": [t.cached_index, t.outlier_weight],
    }
    lists[kind].pop()
    with pytest.raises(OperandError, match=f"{kind} has .* tensors.*takes"):
        linear(x=t.x, bias=t.bias, **lists, row_mask=None, recipe=str(recipe_of(shape, 8)))
