"""What was measured (benchmarks/results): where the weight-only kernels are faster, the gain over 16 bit."""

from __future__ import annotations

import bisect
import functools
import math

import torch

from mixq_compile.ops.providers import KernelQuery

SMALL_BATCH = 16
NARROW_SMALL_BATCH = 32
NARROW = 8192
FOUR_BIT_SMALL_BATCH = 64

MEASURED_DEVICE = "H200"
MEASURED_ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)
SPEEDUPS = {
    8: {
        (11008, 4096): (1.37, 1.39, 1.29, 1.27, 1.18, 1.05, 1.29, 1.4, 1.71),
        (4096, 11008): (1.61, 1.59, 1.33, 1.15, 1.08, 1.25, 1.26, 1.37, 1.56),
        (28672, 8192): (1.85, 1.75, 1.68, 1.75, 1.8, 1.61, 1.72, 1.87, 1.66),
        (4096, 4096): (1.52, 1.43, 1.27, 0.97, 0.95, 1.14, 1.05, 1.18, 1.46),
        (2048, 2048): (1.03, 1.04, 0.89, 0.71, 0.66, 0.64, 0.76, 0.78, 1.06),
    },
    4: {
        (11008, 4096): (1.87, 1.8, 1.46, 0.9, 0.75, 0.65, 0.88, 1.12, 1.57),
        (4096, 11008): (2.07, 2.04, 1.52, 1.08, 0.69, 0.74, 0.84, 1.09, 1.46),
        (28672, 8192): (2.62, 2.41, 1.72, 1.1, 0.81, 0.68, 0.94, 1.33, 1.5),
        (4096, 4096): (1.62, 1.6, 1.34, 0.97, 0.72, 0.78, 0.81, 0.99, 1.37),
        (2048, 2048): (0.99, 1.0, 0.8, 0.62, 0.55, 0.55, 0.6, 0.67, 0.99),
    },
}
"""For bits of a weight code, and N and K: time of bf16 over ours at each of `MEASURED_ROWS`."""


def small_batch(query: KernelQuery) -> int:
    """The largest M that the weight-only kernels serve better."""
    if query.weight_bits == 4:
        return FOUR_BIT_SMALL_BATCH
    if query.out_features is not None and query.out_features <= NARROW:
        return NARROW_SMALL_BATCH
    return SMALL_BATCH


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def speedup(query: KernelQuery, rows: int) -> float | None:
    """Time of the 16-bit linear over ours at M = rows, from the measured shape nearest to the query's.

    None on other GPUs than the measured one, for fp32, and where the shape is not known. Shapes much
    smaller than those measured gain less than this says: launches take all their time.
    """
    if query.in_features is None or query.out_features is None or query.dtype == torch.float32:
        return None
    if MEASURED_DEVICE not in _device_name(query.device):
        return None
    wanted = (math.log(query.out_features), math.log(query.in_features))
    table = SPEEDUPS[query.weight_bits]
    nearest = min(table, key=lambda shape: math.dist(wanted, (math.log(shape[0]), math.log(shape[1]))))
    gains = table[nearest]
    above = bisect.bisect_left(MEASURED_ROWS, rows)
    if above == 0 or above == len(MEASURED_ROWS):
        return gains[min(above, len(gains) - 1)]
    below = above - 1
    low, high = math.log(MEASURED_ROWS[below]), math.log(MEASURED_ROWS[above])
    part = (math.log(rows) - low) / (high - low)
    return gains[below] + part * (gains[above] - gains[below])
