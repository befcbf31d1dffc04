"""`quantized_linear` on the CPU: blocks of rows stay in the cache from the product to their codes."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from mixq_compile.kernels.cpu.availability import PRIORITY, supports
from mixq_compile.kernels.cpu.build import library
from mixq_compile.kernels.cpu.interface import CPU, type_number
from mixq_compile.kernels.cpu.linears import LinearOperands
from mixq_compile.kernels.cpu.quantization import Quantization, quantize_online
from mixq_compile.ops.providers import provider
from mixq_compile.ops.state_access import STATES

ROWS_WORTH_FUSING = 256
"""Fewer rows are too few blocks for all threads."""
LARGEST_FUSED_WEIGHT = 1 << 23
"""Codes: all are packed at once, and a larger weight no longer stays in a cache between blocks of rows."""


@provider("quantized_linear", name="cpu", priority=PRIORITY, supports=supports)
def quantized_linear(
    codes: Tensor,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    function: str,
    format: str,
    miss: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where no row exceeds the threshold the numbers are neither written to memory nor rounded to dtype."""
    operands = LinearOperands(codes, scale, outliers, count, weight_codes, weight_scale, outlier_weight, bias)
    leading, features, dtype = tuple(codes.shape[:-1]), weight_codes.shape[0], outliers.dtype
    rows, in_features = operands.codes.shape
    shared = (index, column_slot, column_max, counters, effective_threshold)
    fits = rows >= ROWS_WORTH_FUSING and features * in_features <= LARGEST_FUSED_WEIGHT
    if fits and miss != "per_call":
        state = STATES.current(shared)
        call = Quantization(leading, features, dtype, state[0], state[1], format)
        linear = operands.arguments(None, torch.float32, function)
        next_state = call.arguments(state[3], None if miss == "static" else state[4])
        if not library().mixq_quantized_linear(byref(linear), byref(next_state), type_number(dtype)):
            return *call.results(), call.used
    numbers = operands.multiply(torch.empty((*leading, features), dtype=dtype, device=CPU), function)
    return quantize_online(numbers, *shared, format, miss, 0)  # type: ignore[no-any-return]
