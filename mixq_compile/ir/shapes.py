"""Numbers of rows and features that passes may know without adding a guard."""

from __future__ import annotations

import torch
from torch import Tensor


def hint_of(size: int | torch.SymInt) -> int | None:
    """The value a size had when it was traced, without a guard on it; None where it has none."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return int(hint) if isinstance(hint, int) else None


def row_count(value: Tensor) -> tuple[int | None, int | None]:
    """The rows of a value `[..., K]`: (the number if it is fixed, the number it was traced with)."""
    fixed: int | None = 1
    traced: int | None = 1
    for size in value.shape[:-1]:
        hint = hint_of(size)
        fixed = fixed * size if fixed is not None and isinstance(size, int) else None
        traced = traced * hint if traced is not None and hint is not None else None
    return fixed, traced
