"""One list of activation functions serves operators, providers and passes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from operator_calls import ARGUMENTS, OPERATORS, SHAPES, tensors
from torch import nn

from mixq_compile.errors import OptionError
from mixq_compile.ir.activation_functions import ACTIVATIONS, activation_function
from mixq_compile.kernels.cpu import interface
from mixq_compile.ops.activation_functions import ACTIVATED, FUNCTIONS, QUANTIZING

MODULES = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_is_what_torch_names_so(name: str) -> None:
    x = torch.linspace(-4, 4, 33)
    assert torch.equal(FUNCTIONS[name](x), MODULES[name](x))


def test_the_functions_of_a_kernel_are_some_of_them() -> None:
    assert set(ACTIVATED) == set(FUNCTIONS) - {"none"}
    assert set(QUANTIZING) <= set(FUNCTIONS)


def test_the_numbers_in_the_cpp_kernels() -> None:
    """Another order would compute another function."""
    header = (Path(interface.__file__).parent / "activations.h").read_text()
    (listed,) = re.findall(r"enum Activation \{(.*?)\};", header)
    numbers = dict(item.split("=") for item in listed.lower().replace(" ", "").split(","))
    assert {name: str(number) for name, number in interface.ACTIVATIONS.items()} == numbers


def test_the_numbers_in_the_gpu_kernels() -> None:
    hopper = pytest.importorskip("mixq_compile.kernels.tl.hopper")
    assert tuple(FUNCTIONS) == hopper.FUNCTIONS


def test_passes_find_no_others() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    calls = [graph.call_function(target, (x,)) for target in ACTIVATIONS]
    calls += [graph.call_function(torch.nn.functional.gelu, (x,), {"approximate": "tanh"})]
    assert {activation_function(call) for call in calls} == set(ACTIVATED)


@pytest.mark.parametrize(
    ("operator", "operand", "unknown"),
    [("activated_linear", "function", "tanh"), ("activated_linear", "function", "none"),
     ("quantized_linear", "function", "silu")],
)  # fmt: skip
def test_an_operator_refuses_any_other(operator: str, operand: str, unknown: str) -> None:
    arguments = list(ARGUMENTS[operator](tensors(SHAPES["plain"]), SHAPES["plain"]))
    names = list(inspect.signature(OPERATORS[operator]._init_fn).parameters)
    arguments[names.index(operand)] = unknown
    valid = ACTIVATED if operator == "activated_linear" else QUANTIZING
    with pytest.raises(OptionError, match=f"unknown activation function '{unknown}'") as caught:
        OPERATORS[operator](*arguments)
    assert all(name in str(caught.value) for name in valid)
