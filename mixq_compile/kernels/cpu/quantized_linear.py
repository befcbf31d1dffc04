"""A linear, its activation and the quantization for the next linear in one kernel.

No operator stands for it yet: it is what a pass that fuses an activation between two linears would call.
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from mixq_compile.kernels.cpu.build import library
from mixq_compile.kernels.cpu.interface import type_number
from mixq_compile.kernels.cpu.linears import LinearOperands
from mixq_compile.kernels.cpu.quantization import Quantization, quantize_online

ROWS_WORTH_FUSING = 256
"""Fewer rows are too few blocks for all threads."""


def quantized_linear(
    operands: LinearOperands,
    leading: tuple[int, ...],
    dtype: torch.dtype,
    activation: str,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    bits: int,
    miss: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `quantize_online` returns for `activation(mixed_linear(...))`, `[*leading, N]` of this dtype.

    Where no row exceeds the threshold the numbers themselves are never written to memory, nor rounded
    to dtype.
    """
    features = operands.weight_codes.shape[0]
    if operands.codes.shape[0] >= ROWS_WORTH_FUSING and miss != "per_call":
        call = Quantization(leading, features, dtype, index, column_slot, bits)
        linear = operands.arguments(None, torch.float32, activation)
        next_state = call.arguments(counters, None if miss == "static" else effective_threshold)
        if not library().mixq_quantized_linear(byref(linear), byref(next_state), type_number(dtype)):
            return *call.results(), call.used
    numbers = operands.multiply(torch.empty((*leading, features), dtype=dtype), activation)
    return quantize_online(  # type: ignore[no-any-return]
        numbers, index, column_slot, column_max, counters, effective_threshold, bits, miss, 0
    )
