"""`absmax`: scales from the largest magnitude, or the extremes, so that nothing is clipped."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.weights import rounding
from mixq_compile.weights.solvers.registry import Solution

NEEDS: tuple[str, ...] = ()
JOINT = False


def solve(matrix: Tensor, fmt: TensorFormat, inputs: Mapping[str, Tensor]) -> Solution:
    """Codes, scales and zero points of a weight `[N, K]`: rounded to nearest."""
    return Solution(*rounding.rounded(matrix, fmt))
