"""`clip`: of narrower and narrower ranges, the one with the smallest squared error, for each scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.weights import rounding
from mixq_compile.weights.solvers.registry import Solution

NEEDS: tuple[str, ...] = ()
JOINT = False
CANDIDATES = 41
SMALLEST = 0.5
"""The narrowest range, as a part of the whole one."""


def solve(matrix: Tensor, fmt: TensorFormat, inputs: Mapping[str, Tensor]) -> Solution:
    """Codes, scales and zero points of a weight `[N, K]`; values beyond the chosen range are clipped."""
    scale, zero = narrowed(matrix, fmt)
    return Solution(rounding.codes_of(matrix, scale, zero, fmt), scale, zero)


def narrowed(
    matrix: Tensor, fmt: TensorFormat, moments: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The scales and zero points of the smallest squared error, in which `moments` `[K]` weigh columns."""
    low, high = rounding.extremes(matrix, fmt)
    best = rounding.scale_of(low, high, fmt)
    best_error = torch.full(low.shape, torch.inf, dtype=low.dtype, device=low.device)
    for ratio in _ratios(fmt):
        scale, zero = rounding.scale_of(low * ratio, high * ratio, fmt)
        error = rounding.squared_error(matrix, scale, zero, fmt, moments)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = _where(better, scale, best[0]), None if zero is None else _where(better, zero, best[1])
    return best


def _ratios(fmt: TensorFormat) -> list[float]:
    if fmt.scale == "power_of_two":
        return [1.0, SMALLEST]  # The exponent, and the one below: no others lie between.
    # In fp32 on the CPU, whatever torch's defaults are: the ratios are part of the format of a weight.
    ratios: list[float] = torch.linspace(
        1.0, SMALLEST, CANDIDATES, dtype=torch.float32, device="cpu"
    ).tolist()
    return ratios


def _where(better: Tensor, new: Tensor, best: Tensor | None) -> Tensor:
    return new if best is None else torch.where(better, new, best)
