"""Operators of the `mixq::` namespace, their providers and the outlier state they change."""

from mixq_compile.ops.activated_linear import activated_linear
from mixq_compile.ops.dequantize import dequantize
from mixq_compile.ops.grouped_linear import grouped_linear
from mixq_compile.ops.linear import linear
from mixq_compile.ops.mixed_gemm import mixed_gemm
from mixq_compile.ops.mixed_linear import mixed_linear
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.quantize import quantize
from mixq_compile.ops.quantize_affine import quantize_affine
from mixq_compile.ops.quantize_and_refresh import quantize_and_refresh
from mixq_compile.ops.quantize_online import quantize_online
from mixq_compile.ops.quantized_linear import quantized_linear
from mixq_compile.ops.refresh_outlier_weights import refresh_outlier_weights
from mixq_compile.ops.weight_only_linear import weight_only_linear

__all__ = [
    "OutlierState",
    "activated_linear",
    "dequantize",
    "grouped_linear",
    "linear",
    "mixed_gemm",
    "mixed_linear",
    "quantize",
    "quantize_affine",
    "quantize_and_refresh",
    "quantize_online",
    "quantized_linear",
    "refresh_outlier_weights",
    "weight_only_linear",
]
