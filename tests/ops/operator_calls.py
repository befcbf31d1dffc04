"""Arguments for each `mixq::` operator, in several shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixq_compile import ops
from mixq_compile.formats import TensorFormat
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.scheme import WeightRecipe

OPERATORS: dict[str, Any] = {
    name: getattr(ops, name)
    for name in (
        "quantize",
        "quantize_online",
        "refresh_outlier_weights",
        "mixed_gemm",
        "dequantize",
        "mixed_linear",
        "weight_only_linear",
        "activated_linear",
        "linear",
        "quantized_linear",
    )
}


@dataclass(frozen=True)
class Shape:
    """Shape and dtype of one linear and its input."""

    leading: tuple[int, ...] = (5,)
    in_features: int = 48
    out_features: int = 32
    capacity: int = 16
    columns: tuple[int, ...] = (3, 40)
    """Outlier columns known before the call."""
    planted: tuple[int, ...] = (3, 17)
    """Columns of the input above the threshold."""
    weight_bits: int = 8
    activation_bits: int = 8
    bias: bool = True
    original: bool = True
    dtype: torch.dtype = torch.float32
    small_m: int = 0
    miss: str = "exact"


SHAPES: dict[str, Shape] = {
    "plain": Shape(),
    "three_dimensions": Shape(leading=(2, 3), dtype=torch.bfloat16),
    "one_row": Shape(leading=(1,), dtype=torch.float16),
    "no_rows": Shape(leading=(0,)),
    "ragged": Shape(in_features=51, out_features=37, bias=False),
    "four_bits": Shape(in_features=51, weight_bits=4, activation_bits=4, original=False),
    "no_slots": Shape(capacity=0, columns=(), miss="static"),
    "weight_only": Shape(small_m=8),
    "lazy": Shape(miss="lazy"),
    "per_call": Shape(miss="per_call"),
    "vector": Shape(leading=()),
}


@dataclass
class Tensors:
    """The tensors of one linear."""

    x: Tensor
    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    weight: Tensor
    original: Tensor
    state: OutlierState
    cached_index: Tensor
    outlier_weight: Tensor


def tensors(shape: Shape, seed: int = 0) -> Tensors:
    """Random tensors of a shape."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape.leading, shape.in_features, generator=generator).clamp_(-4, 4)
    if x.numel():
        x.view(-1, shape.in_features)[0, list(shape.planted)] = 20.0
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator).to(shape.dtype)
    codes, scale = quantize_weight(weight, WeightRecipe(TensorFormat(shape.weight_bits)))
    state = OutlierState.create(shape.in_features, shape.capacity, 6.0, "cpu")
    state.preload(shape.columns)
    bias = torch.randn(shape.out_features, generator=generator).to(shape.dtype) if shape.bias else None
    return Tensors(
        x=x.to(shape.dtype),
        codes=codes,
        scale=scale,
        bias=bias,
        weight=weight,
        original=weight if shape.original else weight.new_empty(0),
        state=state,
        cached_index=torch.full((shape.capacity,), -1, dtype=torch.int32),
        outlier_weight=torch.zeros(shape.out_features, shape.capacity, dtype=shape.dtype),
    )


def quantized(t: Tensors, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and outliers of the input with the columns known before."""
    state = t.state
    return ops.quantize(  # type: ignore[no-any-return]
        t.x, state.index, state.column_slot, state.counters, shape.activation_bits, shape.small_m, "ref"
    )


def _quantize(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    state = t.state
    return t.x, state.index, state.column_slot, state.counters, shape.activation_bits, shape.small_m, "ref"


def _quantize_online(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    return t.x, *t.state.buffers(), shape.activation_bits, shape.miss, shape.small_m, "ref"


def _refresh(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    codes, _, _ = quantized(t, shape)
    second = (t.cached_index.clone(), t.outlier_weight.clone())
    return (
        codes, t.state.index, t.state.counters[:1].clone(), [t.cached_index, second[0]],
        [t.outlier_weight, second[1]], [t.codes] * 2, [t.scale] * 2, [t.original, t.weight.new_empty(0)],
        shape.small_m, "ref",
    )  # fmt: skip


def _mixed_gemm(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    codes, _, outliers = quantized(t, shape)
    return codes, outliers, t.state.counters, t.codes, t.outlier_weight, "ref"


def _dequantize(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    _, scale, _ = quantized(t, shape)
    accumulator, product = ops.mixed_gemm(*_mixed_gemm(t, shape))
    return t.x, accumulator, product, scale, t.scale, t.bias, "ref"


def _mixed_linear(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    codes, scale, outliers = quantized(t, shape)
    return (
        t.x, codes, scale, outliers, t.state.counters, t.codes, t.scale, t.outlier_weight, t.bias,
        shape.small_m, "ref",
    )  # fmt: skip


def _activated_linear(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    *operands, small_m, kernel = _mixed_linear(t, shape)
    return *operands, "silu", shape.out_features % 2 == 0, small_m, kernel


def _weight_only(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    return t.x, t.codes, t.scale, t.bias, "ref"


def _quantized_linear(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    codes, scale, outliers = quantized(t, shape)
    following = OutlierState.create(shape.out_features, 16, 6.0, "cpu")
    return (
        codes, *following.buffers(), scale, outliers, t.state.counters, t.codes, t.scale, t.outlier_weight,
        t.bias, "gelu", shape.activation_bits, "exact", "ref",
    )  # fmt: skip


def _linear(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    bits = 16 if shape.small_m else shape.activation_bits
    return (
        t.x, t.codes, t.scale, t.bias, *t.state.buffers(), t.cached_index, t.outlier_weight, t.original,
        bits, True, f"{shape.miss} 6.0",
    )  # fmt: skip


ARGUMENTS: dict[str, Callable[[Tensors, Shape], tuple[Any, ...]]] = {
    "quantize": _quantize,
    "quantize_online": _quantize_online,
    "refresh_outlier_weights": _refresh,
    "mixed_gemm": _mixed_gemm,
    "dequantize": _dequantize,
    "mixed_linear": _mixed_linear,
    "activated_linear": _activated_linear,
    "weight_only_linear": _weight_only,
    "linear": _linear,
    "quantized_linear": _quantized_linear,
}
"""By operator: the arguments of a call on these tensors."""


def applies(operator: str, shape: Shape) -> bool:
    """False for a call that no graph makes: learning without slots, learning under `static`."""
    return operator != "quantize_online" or (shape.capacity > 0 and shape.miss != "static")
