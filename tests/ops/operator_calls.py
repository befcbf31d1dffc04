"""Arguments for each `mixq::` operator, in several shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixq_compile import ops
from mixq_compile.formats import TensorFormat
from mixq_compile.ops.linear_recipe import LinearRecipe
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.weight_codes import codes_dtype, quantize_weight
from mixq_compile.scheme import WeightRecipe
from mixq_compile.weights.recipe import make

OPERATORS: dict[str, Any] = {
    name: getattr(ops, name)
    for name in (
        "quantize",
        "quantize_affine",
        "quantize_online",
        "quantize_and_refresh",
        "refresh_outlier_weights",
        "mixed_gemm",
        "dequantize",
        "mixed_linear",
        "grouped_linear",
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
    grouped: str = "uint8/16"
    """Format of the weight of a product that takes any."""
    bias: bool = True
    original: bool = True
    dtype: torch.dtype = torch.float32
    small_m: int = 0
    miss: str = "exact"
    weight_format: str = ""
    """Of the weight-only operator's weight, where a dtype does not tell it."""
    padded: bool = False
    """Whether every second row teaches nothing, and the operands with a default are given."""

    @property
    def activation(self) -> str:
        """The format of the activation's codes."""
        return f"int{self.activation_bits}"


SHAPES: dict[str, Shape] = {
    "plain": Shape(),
    "three_dimensions": Shape(leading=(2, 3), dtype=torch.bfloat16, grouped="uint4/16"),
    "one_row": Shape(leading=(1,), dtype=torch.float16, grouped="int4"),
    "no_rows": Shape(leading=(0,)),
    "ragged": Shape(in_features=51, out_features=37, bias=False, grouped="int2/7"),
    "four_bits": Shape(in_features=51, weight_bits=4, activation_bits=4, original=False, grouped="mxint4/16"),
    "no_slots": Shape(capacity=0, columns=(), miss="static"),
    "weight_only": Shape(small_m=8),
    "lazy": Shape(miss="lazy"),
    "per_call": Shape(miss="per_call"),
    "vector": Shape(leading=()),
    "in_groups": Shape(in_features=51, weight_format="int4/16"),
    "zero_points": Shape(in_features=51, weight_format="uint4/16"),
    "zero_points_of_rows": Shape(weight_format="uint8"),
    "padded": Shape(leading=(2, 3), padded=True),
    "padded_per_call": Shape(miss="per_call", padded=True),
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
        t.x, state.index, state.column_slot, state.counters, shape.activation, shape.small_m, "ref"
    )


def _addend(t: Tensors, shape: Shape) -> Tensor | None:
    if not shape.padded:
        return None
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape.leading, shape.out_features, generator=generator).to(shape.dtype)


def formatted_weight(
    weight: TensorFormat, out_features: int, in_features: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random codes, scales and zero points of a format, as they lie in memory."""
    generator = torch.Generator().manual_seed(seed)
    rows, row_bytes = weight.codes_shape(out_features, in_features)
    low, high = (0, 256) if codes_dtype(weight) == torch.uint8 else (-128, 128)
    codes = torch.randint(low, high, (rows, row_bytes), generator=generator).to(codes_dtype(weight))
    shape = weight.scale_shape(out_features, in_features)
    scale = torch.rand(shape, generator=generator) + 0.1
    zero = torch.randint(0, 1 << weight.bits, shape, generator=generator).to(torch.uint8)
    return codes, scale, None if weight.signed else zero


def _quantize(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    state = t.state
    return t.x, state.index, state.column_slot, state.counters, shape.activation, shape.small_m, "ref"


def _quantize_affine(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    state, format = t.state, f"u{shape.activation}"
    return t.x, state.index, state.column_slot, state.counters, format, "ref"


def _quantize_online(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    mask = (torch.arange(t.x[..., 0].numel()) % 2 == 0).view(shape.leading) if shape.padded else None
    return t.x, *t.state.buffers(), shape.activation, shape.miss, shape.small_m, "ref", mask


def _quantize_and_refresh(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    lists = [t.cached_index], [t.outlier_weight], [t.codes], [t.scale], [t.original]
    *quantize, kernel, mask = _quantize_online(t, shape)
    x, state, (format, miss, small_m) = quantize[0], quantize[1:6], quantize[6:]
    return x, *state, *lists, format, miss, small_m, kernel, "ref", mask


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
    return t.x, accumulator, product, scale, t.scale, t.bias, "ref", _addend(t, shape)


def _mixed_linear(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    codes, scale, outliers = quantized(t, shape)
    return (
        t.x, codes, scale, outliers, t.state.counters, t.codes, t.scale, t.outlier_weight, t.bias,
        shape.small_m, "ref", _addend(t, shape),
    )  # fmt: skip


def _grouped_linear(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    codes, scale, outliers = quantized(t, shape)
    recipe = WeightRecipe(TensorFormat.parse(shape.grouped))
    weight = make(recipe, t.weight, shape.dtype)
    addend = t.x.new_full((*shape.leading, shape.out_features), 0.5)
    return (
        codes, scale, outliers, t.state.counters, weight.codes, weight.scale, weight.zero, t.outlier_weight,
        t.bias, addend, shape.grouped, "ref",
    )  # fmt: skip


def _activated_linear(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    *operands, small_m, kernel, _ = _mixed_linear(t, shape)
    return *operands, "silu", shape.out_features % 2 == 0, small_m, kernel


def _weight_only(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    addend = _addend(t, shape)
    if not shape.weight_format:
        return t.x, t.codes, t.scale, t.bias, "ref", addend, None, ""
    codes, scale, zero = formatted_weight(TensorFormat.parse(shape.weight_format), *t.weight.shape)
    return t.x, codes, scale, t.bias, "ref", addend, zero, shape.weight_format


def _quantized_linear(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    codes, scale, outliers = quantized(t, shape)
    following = OutlierState.create(shape.out_features, 16, 6.0, "cpu")
    return (
        codes, *following.buffers(), scale, outliers, t.state.counters, t.codes, t.scale, t.outlier_weight,
        t.bias, "gelu", shape.activation, "exact", "ref",
    )  # fmt: skip


def recipe_of(shape: Shape, activation_bits: int) -> LinearRecipe:
    """What `mixq::linear` computes on tensors of this shape; 16 bits are weight-only."""
    return LinearRecipe(
        weight=WeightRecipe(TensorFormat(shape.weight_bits)),
        activation=None if activation_bits == 16 else TensorFormat(activation_bits),
        miss=shape.miss,
        threshold=6.0,
        batch_invariant=True,
    )


def _linear(t: Tensors, shape: Shape) -> tuple[Any, ...]:
    recipe = recipe_of(shape, 16 if shape.small_m else shape.activation_bits)
    lists = [t.codes, t.scale, t.original], list(t.state.buffers()), [t.cached_index, t.outlier_weight]
    return t.x, t.bias, *lists, None, str(recipe)


ARGUMENTS: dict[str, Callable[[Tensors, Shape], tuple[Any, ...]]] = {
    "quantize": _quantize,
    "quantize_affine": _quantize_affine,
    "quantize_online": _quantize_online,
    "quantize_and_refresh": _quantize_and_refresh,
    "refresh_outlier_weights": _refresh,
    "mixed_gemm": _mixed_gemm,
    "dequantize": _dequantize,
    "mixed_linear": _mixed_linear,
    "grouped_linear": _grouped_linear,
    "activated_linear": _activated_linear,
    "weight_only_linear": _weight_only,
    "linear": _linear,
    "quantized_linear": _quantized_linear,
}
"""By operator: the arguments of a call on these tensors."""


def applies(operator: str, shape: Shape) -> bool:
    """False for a call that no graph makes: learning without slots, learning under `static`."""
    return operator not in ("quantize_online", "quantize_and_refresh") or (
        shape.capacity > 0 and shape.miss != "static"
    )
