"""The format of an activation's codes is a text: what it means, and what is refused, whoever is asked."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import operator_calls
import pytest
import torch
from operator_calls import ARGUMENTS, OPERATORS, SHAPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from mixq_compile.errors import OptionError
from mixq_compile.formats import TensorFormat
from mixq_compile.ops.activation_codes import largest_code

WRITING = ("quantize", "quantize_online", "quantized_linear")
"""The operators that write codes of an activation."""
NOT_WRITTEN = ("int4/64", "uint4", "int2", "uint8", "mxint4/16")
NO_FORMAT = ("int3", "", "8", "INT8")
MESSAGES = dict.fromkeys(NOT_WRITTEN, "quantized to int8 or int4") | dict.fromkeys(
    NO_FORMAT, "no number format|2, 4 or 8 bits"
)


def call(name: str, format: str, kernel: str = "ref") -> tuple[Any, list[Any]]:
    """An operator, and arguments on which it would learn a column."""
    operator = OPERATORS[name]
    arguments = list(ARGUMENTS[name](operator_calls.tensors(SHAPES["plain"]), SHAPES["plain"]))
    names = [argument.name for argument in operator._opoverload._schema.arguments]
    arguments[names.index("format")] = format
    arguments[names.index("kernel")] = kernel
    return operator, arguments


@pytest.mark.parametrize("kernel", ["auto", "ref", "cpu"])
@pytest.mark.parametrize("format", MESSAGES)
@pytest.mark.parametrize("name", WRITING)
def test_another_format_is_refused_before_anything_is_learned(name: str, format: str, kernel: str) -> None:
    operator, arguments = call(name, format, kernel)
    before = [item.clone() if isinstance(item, torch.Tensor) else item for item in arguments]
    with pytest.raises(OptionError, match=MESSAGES[format]):
        operator(*arguments)
    changed = [
        place
        for place, (now, then) in enumerate(zip(arguments, before, strict=True))
        if isinstance(now, torch.Tensor) and not torch.equal(now, then)
    ]
    assert not changed, f"mixq::{name} changed its arguments {changed} before it refused {format!r}"


@pytest.mark.parametrize("format", MESSAGES)
@pytest.mark.parametrize("name", WRITING)
def test_a_trace_refuses_it_too(name: str, format: str) -> None:
    operator, arguments = call(name, format)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with pytest.raises(OptionError, match=MESSAGES[format]):
            operator(*fakes)


@pytest.mark.parametrize("kernel", ["auto", "ref", "cpu"])
@pytest.mark.parametrize(("format", "largest"), [("int8", 127), ("int4", 7)])
def test_the_largest_code_of_each_row_is_the_formats(format: str, largest: int, kernel: str) -> None:
    operator, arguments = call("quantize_online", format, kernel)
    codes = operator(*arguments)[0]
    assert codes.abs().amax(dim=1).tolist() == [largest] * codes.shape[0]
    assert largest_code(format) == largest


@pytest.mark.parametrize("text", ["int2", "int8/16", "mxint4/16", "uint2"])
def test_a_whole_linear_refuses_formats_that_no_quantization_writes(text: str) -> None:
    shape = SHAPES["plain"]
    tensors = operator_calls.tensors(shape)
    before = copy.deepcopy(tensors.state.buffers())
    *arguments, _ = ARGUMENTS["linear"](tensors, shape)
    recipe = str(dataclasses.replace(operator_calls.recipe_of(shape, 8), activation=TensorFormat.parse(text)))
    with pytest.raises(OptionError, match=text):
        OPERATORS["linear"](*arguments, recipe)
    for now, then in zip(tensors.state.buffers(), before, strict=True):
        assert torch.equal(now, then), "columns were learned first"
    there = tree_map(lambda each: each.to("meta") if isinstance(each, torch.Tensor) else each, arguments)
    with pytest.raises(OptionError, match=text):
        OPERATORS["linear"](*there, recipe)
