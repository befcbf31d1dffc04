"""A value and its quantization in one operator: norms, and activation functions with or without a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixq_compile.ops.declarations import LAYOUT, quantized_like
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.ops.providers import declare, run

NORMS = ("rms", "layer")
"""`rms` rounds to x's dtype before the weight is applied, as Llama's does; `layer` is torch's."""
FUNCTIONS = ("silu", "gelu", "gelu_tanh")
"""`gelu` is the exact one, by the error function."""


@torch.library.custom_op("mixq::norm_quantize", mutates_args=STATE_FIELDS, tags=LAYOUT)
def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    epsilon: float,
    norm: str,
    bits: int,
    miss: str,
    small_m: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The value `y = norm(x)` and what `quantize_online` returns for it.

    x `[..., K]`, weight and bias `[K]` (no bias where the norm is `rms`). y has x's dtype; codes, scales,
    outliers and state are exactly those of y. At most `small_m` rows are normalized only.
    """
    return run(  # type: ignore[no-any-return]
        "norm_quantize", kernel, x, 8,
        x, weight, bias, index, column_slot, column_max, counters, effective_threshold, epsilon, norm, bits,
        miss, small_m,
    )  # fmt: skip


@norm_quantize.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *quantized_like(x, index.shape[0]), index.new_empty(1)


@torch.library.custom_op("mixq::activation_quantize", mutates_args=STATE_FIELDS, tags=LAYOUT)
def activation_quantize(
    x: Tensor,
    factor: Tensor | None,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    function: str,
    bits: int,
    miss: str,
    small_m: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The value `y = function(x) * factor`, or `function(x)`, and what `quantize_online` returns for it.

    x and factor `[..., K]` of one dtype. `function(x)` is rounded to it before the multiplication; codes,
    scales, outliers and state are exactly those of y. Of at most `small_m` rows only y is computed.
    """
    return run(  # type: ignore[no-any-return]
        "activation_quantize", kernel, x, 8,
        x, factor, index, column_slot, column_max, counters, effective_threshold, function, bits, miss,
        small_m,
    )  # fmt: skip


@activation_quantize.register_fake
def _(x: Tensor, factor: Tensor | None, index: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *quantized_like(x, index.shape[0]), index.new_empty(1)


for _operator in (norm_quantize, activation_quantize):
    declare(_operator._name, _operator._init_fn)
