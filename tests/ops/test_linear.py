"""`mixq::linear` equals the composition of the other operators, for every scheme and policy."""

from __future__ import annotations

import copy

import operator_calls
import pytest
import torch
from operator_calls import SHAPES, Shape, Tensors
from torch import Tensor

from mixq_compile.ops import (
    linear,
    mixed_linear,
    quantize,
    quantize_online,
    refresh_outlier_weights,
    weight_only_linear,
)
from mixq_compile.ops.linear import parse_policy, policy_text
from mixq_compile.scheme import OutlierPolicy

AUTO = "auto"


def whole(t: Tensors, shape: Shape, bits: int) -> Tensor:
    return linear(  # type: ignore[no-any-return]
        t.x, t.codes, t.scale, t.bias, *t.state.buffers(), t.cached_index, t.outlier_weight, t.original,
        bits, True, f"{shape.miss} 6.0",
    )  # fmt: skip


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


@pytest.mark.parametrize("threshold", [6.0, 0.1, 5, float("inf")])
def test_the_policys_text_round_trips(threshold: float) -> None:
    policy = OutlierPolicy(threshold=threshold, miss="lazy")
    assert parse_policy(policy_text(policy)) == ("lazy", threshold)
    assert parse_policy(policy_text(None)) == ("static", float("inf"))
