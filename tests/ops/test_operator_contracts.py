"""Every operator: schema, shapes under fake tensors and tracing, and what it may write."""

from __future__ import annotations

from typing import Any

import operator_calls
import pytest
import torch
from operator_calls import ARGUMENTS, OPERATORS, SHAPES, applies
from torch import Tensor
from torch.utils._pytree import tree_map

from mixq_compile.ops.outlier_state import STATE_FIELDS

CASES = [
    pytest.param(name, shape, id=f"{name}-{label}")
    for name in OPERATORS
    for label, shape in SHAPES.items()
    if applies(name, shape)
]
MUTATED = {
    "quantize_online": set(STATE_FIELDS),
    "quantize_and_refresh": {*STATE_FIELDS, "cached_index", "outlier_weight"},
    "refresh_outlier_weights": {"cached_index", "outlier_weight"},
    "quantized_linear": set(STATE_FIELDS),
    "linear": {"state", "cache"},
}
"""Arguments that an operator may write; all others none."""


def overload(name: str) -> Any:
    return getattr(torch.ops.mixq, name).default


def test_every_registered_operator_is_checked_here() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name[:6] == "mixq::"
    }
    assert {name.split(".")[0] for name in registered} == set(OPERATORS) == set(ARGUMENTS)


@pytest.mark.parametrize("name", OPERATORS)
def test_only_state_is_declared_as_written(name: str) -> None:
    arguments = overload(name)._schema.arguments
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == MUTATED.get(name, set())


@pytest.mark.parametrize("name", OPERATORS)
def test_arguments_are_tensors_numbers_and_short_texts(name: str) -> None:
    kinds = {str(argument.type) for argument in overload(name)._schema.arguments}
    assert kinds <= {"Tensor", "Optional[Tensor]", "List[Tensor]", "int", "float", "bool", "str"}
    assert not any(argument.kwarg_only for argument in overload(name)._schema.arguments)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_schema_and_shapes(name: str, shape: operator_calls.Shape) -> None:
    arguments = ARGUMENTS[name](operator_calls.tensors(shape), shape)
    torch.library.opcheck(
        overload(name), arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


@pytest.mark.parametrize("label", ["plain", "three_dimensions", "ragged"])
@pytest.mark.parametrize("shapes", ["static", "dynamic"])
@pytest.mark.parametrize("name", OPERATORS)
def test_tracing(name: str, shapes: str, label: str) -> None:
    arguments = ARGUMENTS[name](operator_calls.tensors(SHAPES[label]), SHAPES[label])
    torch.library.opcheck(overload(name), arguments, test_utils=f"test_aot_dispatch_{shapes}")


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_writes_nothing_else(name: str, shape: operator_calls.Shape) -> None:
    arguments = ARGUMENTS[name](operator_calls.tensors(shape), shape)
    before = tree_map(lambda item: item.clone() if isinstance(item, Tensor) else item, arguments)
    OPERATORS[name](*arguments)
    names = [argument.name for argument in overload(name)._schema.arguments]
    for argument, given, copy in zip(names, arguments, before, strict=True):
        if argument not in MUTATED.get(name, set()):
            pairs = zip(
                given if isinstance(given, list) else [given],
                copy if isinstance(copy, list) else [copy],
                strict=True,
            )
            for now, then in pairs:
                if isinstance(now, Tensor):
                    assert torch.equal(now, then), f"mixq::{name} wrote its argument {argument}"


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_results_share_no_memory_with_arguments(name: str, shape: operator_calls.Shape) -> None:
    arguments = ARGUMENTS[name](operator_calls.tensors(shape), shape)
    results = OPERATORS[name](*arguments)
    given = {
        item.untyped_storage().data_ptr()
        for argument in arguments
        for item in (argument if isinstance(argument, list) else [argument])
        if isinstance(item, Tensor) and item.numel()
    }
    for result in results if isinstance(results, tuple) else (results,):
        if isinstance(result, Tensor) and result.numel():
            assert result.untyped_storage().data_ptr() not in given, (
                f"mixq::{name} returns an argument's memory"
            )
