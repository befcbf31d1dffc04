"""`gram`: the second moment XᵀX of a linear's input, for solvers that weigh errors by it (GPTQ)."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096
"""Most rows of one matrix product: it bounds the float64 copy of the rows and the terms of a sum."""


class GramAccumulator:
    """Adds up XᵀX `[K, K]` of rows X `[M, K]` in float64, on their device."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Takes in finite rows `[M, K]` of any floating dtype."""
        # A product of two 16-bit floats is exact in float32, also where TF32 is allowed, and float64
        # is slow on many GPUs. A float32 product of float32 rows would obey the TF32 switch.
        exact_in_float32 = rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16)
        for chunk in rows.split(CHUNK):
            values = chunk.float() if exact_in_float32 else chunk.double()
            self.total += values.mT @ values

    def value(self) -> Tensor:
        """XᵀX `[K, K]` in fp32 on the CPU, symmetric bit for bit."""
        return ((self.total + self.total.mT) / 2).float().cpu()


ACCUMULATOR = GramAccumulator


def working_bytes(in_features: int) -> int:
    """Bytes on the linear's device while it is collected."""
    return in_features * in_features * 8


def value_bytes(in_features: int) -> int:
    """Bytes of the value, on the CPU."""
    return in_features * in_features * 4


def fits(value: Tensor, in_features: int) -> bool:
    """Whether a tensor can be the value of a linear with K input channels."""
    return value.dtype == torch.float32 and value.shape == (in_features, in_features)
