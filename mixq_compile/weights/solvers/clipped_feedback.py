"""`clipped_feedback`: error feedback (GPTQ) with the scales of `clip`, whose errors the inputs weigh.

At 4 bits the widest scale spends codes on a few large weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.weights.solvers import clip, error_feedback
from mixq_compile.weights.solvers.registry import Solution

NEEDS = error_feedback.NEEDS
JOINT = True


def solve(matrix: Tensor, fmt: TensorFormat, inputs: Mapping[str, Tensor]) -> Solution:
    """Codes, scales and zero points of a weight `[N, K]`, as `error_feedback` has them."""
    return error_feedback.solve(matrix, fmt, inputs, clip.narrowed)
