"""Operands that do not fit each other are errors that name them, in the operator as in its fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import operator_calls
import pytest
import torch
from operator_calls import ARGUMENTS, OPERATORS, SHAPES, recipe_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map
from uncalibrated import UNCALIBRATED

from mixq_compile import MixqLinear
from mixq_compile.errors import OperandError
from mixq_compile.runtime.quantize import quantize
from mixq_compile.schemes.registry import get_scheme

Change = Callable[[Tensor], Tensor]


def names_of(operator: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.mixq, operator).default._schema.arguments]


def call(operator: str, shape: str = "plain") -> dict[str, Any]:
    """The arguments of a call that is right, by name."""
    chosen = SHAPES[shape]
    arguments = ARGUMENTS[operator](operator_calls.tensors(chosen), chosen)
    return dict(zip(names_of(operator), arguments, strict=True))


def fake(arguments: dict[str, Any]) -> list[Any]:
    """The same as fake tensors, for the fake operator."""
    mode = FakeTensorMode()
    return [
        tree_map(lambda item: mode.from_tensor(item) if isinstance(item, Tensor) else item, value)
        for value in arguments.values()
    ]


def longer(tensor: Tensor) -> Tensor:
    """One more in the last dimension."""
    return torch.cat((tensor, tensor[..., :1]), dim=-1)


def more_rows(tensor: Tensor) -> Tensor:
    return torch.cat((tensor, tensor[:1]))


CHANGES: dict[str, Change] = {
    "longer": longer,
    "shorter": lambda tensor: tensor[..., :-1],
    "more rows": more_rows,
    "another dimension": lambda tensor: tensor[None],
    "another dtype": lambda tensor: tensor.to(torch.int64),
    "no dimension": lambda tensor: tensor.flatten()[0],
}
READING_X = (
    "quantize", "quantize_affine", "quantize_online", "quantize_and_refresh", "linear", "weight_only_linear",
)  # fmt: skip
STILL_RIGHT = {
    **{(operator, "x"): {"more rows", "another dimension"} for operator in READING_X},
    # Only the rows of x are read, unless few of them take the weight-only path.
    **{
        (operator, "x"): {"longer", "shorter"}
        for operator in ("dequantize", "mixed_linear", "activated_linear")
    },
    # Its first element is the count: the counters of a state may stand for it.
    **{(operator, "count"): {"longer", "shorter", "more rows"} for operator in OPERATORS},
    # It alone says how many slots there are.
    ("quantize", "index"): {"longer", "shorter", "more rows"},
    ("quantize_affine", "index"): {"longer", "shorter", "more rows"},
    # Only the number of its rows and columns is read.
    ("refresh_outlier_weights", "codes"): {"another dtype", "more rows", "another dimension"},
}
"""By operator and operand: changes after which the call is another right one."""


BLAMED = {"quantize_and_refresh": "(quantize_online|refresh_outlier_weights)"}
"""Operators whose errors name those that they are made of."""


def changed_operands() -> list[Any]:
    return [
        pytest.param(operator, name, place, change, id=f"{operator}-{name}-{place}-{change}")
        for operator in OPERATORS
        for name, value in call(operator).items()
        if isinstance(value, (Tensor, list))
        for place, part in enumerate(value if isinstance(value, list) else [value])
        if part.numel()  # an original without elements is none
        for change in CHANGES
        if change not in STILL_RIGHT.get((operator, name), ())
    ]


@pytest.mark.parametrize(("operator", "name", "place", "change"), changed_operands())
def test_an_operand_that_does_not_fit(operator: str, name: str, place: int, change: str) -> None:
    arguments = call(operator)
    value = arguments[name]
    if isinstance(value, list):
        arguments[name] = [*value[:place], CHANGES[change](value[place]), *value[place + 1 :]]
    else:
        arguments[name] = CHANGES[change](value)
    before = tree_map(
        lambda item: item.clone() if isinstance(item, Tensor) else item, list(arguments.values())
    )
    with pytest.raises(OperandError, match=rf"mixq::{BLAMED.get(operator, operator)}: \w+ "):
        OPERATORS[operator](*arguments.values())
    for now, then in zip(arguments.values(), before, strict=True):
        for left, right in zip(
            *(item if isinstance(item, list) else [item] for item in (now, then)), strict=True
        ):
            if isinstance(left, Tensor):
                assert torch.equal(left, right), "a call that failed has changed an operand"
    with pytest.raises(OperandError, match=rf"mixq::{BLAMED.get(operator, operator)}: \w+ "):
        OPERATORS[operator](*fake(arguments))


@pytest.mark.parametrize("columns", [43, 45])
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_the_error_names_operand_shape_and_expectation(
    weight_bits: int, activation_bits: int, columns: int
) -> None:
    """4-bit codes of 43 and of 44 columns have as many bytes: the state says which it is."""
    shape = operator_calls.Shape(in_features=44, columns=(3, 40), weight_bits=weight_bits)
    arguments = dict(
        zip(names_of("linear"), ARGUMENTS["linear"](operator_calls.tensors(shape), shape), strict=True)
    )
    arguments["recipe"] = str(recipe_of(shape, activation_bits))
    arguments["x"] = torch.zeros(5, columns)
    message = (
        rf"mixq::linear: x has the shape \[5, {columns}\]: it must be \[\.\.\., 44\], "
        r"because \w+ has K = 44\."
    )
    with pytest.raises(OperandError, match=message):
        OPERATORS["linear"](*arguments.values())
    with pytest.raises(OperandError, match=message):
        OPERATORS["linear"](*fake(arguments))


def test_packed_codes_that_are_too_short_or_too_long() -> None:
    arguments = call("weight_only_linear", "four_bits")
    for columns in (50, 53):
        arguments["x"] = torch.zeros(3, columns)
        message = (
            rf"weight_codes has 26 bytes a row.* {columns} columns, as x has, take {(columns + 1) // 2}\."
        )
        with pytest.raises(OperandError, match=message):
            OPERATORS["weight_only_linear"](*arguments.values())


def test_few_rows_read_x() -> None:
    arguments = call("mixed_linear", "weight_only")
    arguments["x"] = longer(arguments["x"])
    with pytest.raises(OperandError, match=r"mixq::mixed_linear: x has the shape \[5, 49\]"):
        OPERATORS["mixed_linear"](*arguments.values())


def test_halves_of_an_odd_number_of_rows() -> None:
    arguments = call("activated_linear", "ragged") | {"gated": True}
    with pytest.raises(OperandError, match=r"weight_codes has 37 rows: a gated linear must have an even"):
        OPERATORS["activated_linear"](*arguments.values())
    with pytest.raises(OperandError, match=r"weight_codes has 37 rows"):
        OPERATORS["activated_linear"](*fake(arguments))


def test_linears_that_share_an_outlier_weight_of_too_few_rows() -> None:
    arguments = call("refresh_outlier_weights")
    arguments["outlier_weight"] = [arguments["outlier_weight"][0].repeat(2, 1)[:-1]]
    for given in (list(arguments.values()), fake(arguments)):
        with pytest.raises(OperandError, match="outlier_weight has 63 rows in all, and weight_codes 64"):
            OPERATORS["refresh_outlier_weights"](*given)


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "refresh_outlier_weights"])
def test_symbolic_rows_get_no_guard(operator: str) -> None:
    arguments = call(operator, "three_dimensions")
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    def symbolic(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        rows = item.dim() > 1 and tuple(item.shape[:2]) == (2, 3)
        sizes = [
            DimDynamic.DYNAMIC if rows and place < 2 else DimDynamic.STATIC for place in range(item.dim())
        ]
        return mode.from_tensor(item, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    values = [tree_map(symbolic, value) for value in arguments.values()]
    with mode:
        result = OPERATORS[operator](*values)
    first = result[0] if isinstance(result, tuple) else result
    assert isinstance(first.shape[0], torch.SymInt), "the rows were made a number"
    assert environment.guards == [], "a check has specialised the graph"


def small_model(scheme: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(44, 20), nn.ReLU(), nn.Linear(20, 8)).requires_grad_(False)
    return quantize(model, scheme=scheme, force=True, keep_originals=True)


@pytest.mark.parametrize("scheme", UNCALIBRATED)
@pytest.mark.parametrize("columns", [43, 45, 1, 0])
def test_a_module_names_itself(scheme: str, columns: int) -> None:
    model = small_model(scheme)
    expected = (
        rf"^0, a MixqLinear\(in_features=44, out_features=20, scheme={scheme}\), was called with x of shape "
        rf"\[5, {columns}\]: its last dimension must be 44\.$"
    )
    with pytest.raises(OperandError, match=expected):
        model(torch.zeros(5, columns))
    with pytest.raises(RuntimeError):  # what nn.Linear raises
        model(torch.zeros(5, columns))


def test_a_module_without_a_name() -> None:
    module = MixqLinear.from_linear(nn.Linear(44, 20).requires_grad_(False), get_scheme("w8a8o16"))
    for shape in ((5, 43), ()):
        with pytest.raises(OperandError, match=r"^a MixqLinear\(in_features=44"):
            module(torch.zeros(shape))


@pytest.mark.parametrize("scheme", UNCALIBRATED)
def test_compiled_code_says_so_too(scheme: str) -> None:
    torch._dynamo.reset()
    fast = torch.compile(small_model(scheme), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"x has the shape \[5, 43\]: it must be \[\.\.\., 44\]"):
        fast(torch.zeros(5, 43))
    torch._dynamo.reset()
