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
        (11008, 4096): (1.4, 1.4, 1.29, 1.28, 1.19, 1.07, 1.29, 1.42, 1.74),
        (4096, 11008): (1.61, 1.6, 1.34, 1.16, 1.09, 1.23, 1.26, 1.39, 1.61),
        (28672, 8192): (1.87, 1.82, 1.76, 1.78, 1.82, 1.66, 1.73, 1.89, 1.9),
        (4096, 4096): (1.47, 1.42, 1.26, 0.97, 0.95, 1.14, 1.03, 1.17, 1.47),
        (2048, 2048): (1.04, 1.01, 0.89, 0.72, 0.66, 0.67, 0.75, 0.77, 1.06),
        (768, 768): (0.97, 0.96, 0.72, 0.59, 0.55, 0.56, 0.58, 0.51, 0.62),
    },
    4: {
        (11008, 4096): (1.89, 1.81, 1.5, 0.91, 0.76, 0.64, 0.88, 1.13, 1.54),
        (4096, 11008): (1.99, 2.08, 1.51, 1.08, 0.7, 0.73, 0.84, 1.1, 1.48),
        (28672, 8192): (2.58, 2.43, 1.72, 1.12, 0.82, 0.71, 0.98, 1.44, 1.79),
        (4096, 4096): (1.61, 1.59, 1.33, 0.98, 0.73, 0.79, 0.82, 0.99, 1.38),
        (2048, 2048): (0.99, 1.02, 0.8, 0.62, 0.56, 0.54, 0.61, 0.69, 0.99),
        (768, 768): (0.92, 0.89, 0.79, 0.6, 0.44, 0.45, 0.47, 0.48, 0.58),
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

    None on other GPUs than the measured one, for fp32, and where the shape is not known.
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
