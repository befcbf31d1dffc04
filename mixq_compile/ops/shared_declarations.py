"""What declarations of `mixq::` operators share. Each operator has a file with its schema and its shapes.

What they compute is `kernels/ref`, the specification. M rows (all leading dimensions together), K =
in_features, N = out_features, C outlier slots. All operators are functional, except that the online ones
change the outlier state and `refresh_outlier_weights` its caches. `count` is int32 and its first element
counts the outlier slots in use, so that `OutlierState.counters` can stand for it. The last argument,
`kernel`, names a provider. Each raises OperandError where shapes, dtypes or devices of its tensors do not
fit each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixq_compile.ops.operands import signature_of
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.ops.weight_codes import ROW_ALIGNMENT

LAYOUT = (torch.Tag.flexible_layout,)
"""Kernels take inputs of any strides; without this tag Inductor copies an input for each of its readers."""

QUANTIZED = ("codes", "scale", "outliers")
"""What quantization returns; where it learns, `count` too."""
STATE = {name: name for name in STATE_FIELDS}
"""The operands of an operator that takes a whole outlier state."""
WEIGHT = ("weight_codes", "weight_scale", "outlier_weight", "bias")
"""The operands of a mixed-precision product that have a row for each output."""


def _codes_like(x: Tensor) -> Tensor:
    padded = (x.shape[-1] + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    return x.new_empty((*x.shape[:-1], padded), dtype=torch.int8)[..., : x.shape[-1]]


def quantized_like(x: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[..., K]`, scale `[...]` and outliers `[..., C]` of x, of which only the shapes count."""
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return _codes_like(x), scale, x.new_empty((*x.shape[:-1], capacity))


class Given(dict[str, Any]):
    """The operands of a call by name, those with a default too, which are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def results_of(operator: Any) -> Callable[[Callable[[Given], Any]], Callable[[Given], Any]]:
    """Decorates what gives the results of an operator, without values, for operands without values.

    For tracing and export: shapes may be symbolic, and nothing may depend on an element.
    """
    signature = signature_of(operator._opoverload)

    def register(results: Callable[[Given], Any]) -> Callable[[Given], Any]:
        def fake(*args: Any, **kwargs: Any) -> Any:
            return results(Given({**signature.defaults, **signature.bind(args, kwargs)}))

        operator.register_fake(fake)
        return results

    return register
