"""Operators of the `mixq::` namespace, their providers and the outlier state they change."""

from mixq_compile.ops.activated_linear import activated_linear
from mixq_compile.ops.declarations import (
    dequantize,
    mixed_gemm,
    mixed_linear,
    quantize,
    quantize_online,
    refresh_outlier_weights,
    weight_only_linear,
)
from mixq_compile.ops.linear import linear
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.quantized_linear import quantized_linear

__all__ = [
    "OutlierState",
    "activated_linear",
    "dequantize",
    "linear",
    "mixed_gemm",
    "mixed_linear",
    "quantize",
    "quantize_online",
    "quantized_linear",
    "refresh_outlier_weights",
    "weight_only_linear",
]
