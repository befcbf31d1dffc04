"""Which linears are left alone whatever they would gain: by name, role, dtype or size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixq_compile.ir.name_patterns import name_matches
from mixq_compile.ir.roles import LM_HEAD, ROUTER

SMALLEST_FEATURES = 16
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NEVER = {
    LM_HEAD: "the output head stays in 16 or 32 bit",
    ROUTER: "a router, or a product that no linear module owns",
}
"""Roles that are never quantized, and why."""
GROUPED = "unsupported: grouped (one product for several experts)"


def ineligible(fqn: str, role: str, weight: Tensor, ignore: Sequence[str]) -> str | None:
    """Why a linear of this name, role and weight is left alone whatever it would gain; None if it is not."""
    pattern = next((entry for entry in ignore if name_matches(fqn, entry)), None)
    if pattern is not None:
        return f"ignored: its name matches {pattern!r}"
    if role in NEVER:
        return NEVER[role]
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}, not a floating-point type that has kernels"
    if min(weight.shape) < SMALLEST_FEATURES:
        return f"too small: {tuple(weight.shape)}, and an integer product needs {SMALLEST_FEATURES} of each"
    return None
