"""Which calls take the weight-only path: decided by the number of rows, in all operators alike."""

from __future__ import annotations

from torch import Tensor


def is_small_batch(rows: Tensor, small_m: int) -> bool:
    """True for a value or its codes `[..., K]` of at most `small_m` rows; never where `small_m` is 0.

    Then nothing is quantized or learned, and products read x itself.
    """
    return small_m > 0 and rows.numel() <= small_m * rows.shape[-1]
