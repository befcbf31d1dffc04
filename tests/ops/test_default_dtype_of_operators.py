"""Each operator by each provider of the CPU under other defaults of torch: no bit changes."""

from __future__ import annotations

from typing import Any

import operator_calls
import pytest
from other_defaults import DEFAULTS, assert_unchanged
from torch import Tensor
from torch.utils._pytree import tree_map

from mixq_compile.ops.providers import providers_of

LABELS = ("plain", "three_dimensions", "ragged", "four_bits", "no_slots", "weight_only", "lazy", "per_call")


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("operator", operator_calls.OPERATORS)
def test_bits(operator: str, label: str, name: str) -> None:
    shape = operator_calls.SHAPES[label]
    if not operator_calls.applies(operator, shape):
        pytest.skip("no graph makes this call")
    given = operator_calls.ARGUMENTS[operator](operator_calls.tensors(shape), shape)
    kernels = [entry.name for entry in providers_of(operator) if entry.name in ("cpu", "ref")]
    assert "ref" in kernels or operator in ("linear", "quantize_and_refresh")
    for kernel in kernels or ["auto"]:
        names = [
            argument.name for argument in operator_calls.OPERATORS[operator]._opoverload._schema.arguments
        ]
        arguments = [kernel if name == "kernel" else value for name, value in zip(names, given, strict=True)]

        def run(arguments: Any = arguments) -> Any:
            own = tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, arguments)
            return operator_calls.OPERATORS[operator](*own), own

        assert_unchanged(name, run)
