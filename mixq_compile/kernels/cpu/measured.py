"""How much faster than the 16 or 32-bit linear these kernels are, measured once per process and shape."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.kernels.cpu.interface import CPU
from mixq_compile.ops.composition import compose, weight_only
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.providers import KernelQuery
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.scheme import OutlierPolicy, WeightRecipe
from mixq_compile.thresholds import DEFAULT_THRESHOLD

LARGEST_ROWS = 8192
LARGEST_WEIGHT = 1 << 24
"""Elements: of a larger weight only so many rows are measured."""
LARGEST_PRODUCTS = 1 << 31
REPETITIONS = 5


def _ratio_of_times(ordinary: Callable[[], Tensor], quantized: Callable[[], Tensor]) -> float:
    """Time of the first over that of the second: the best of each over turns that noise hits alike."""
    best = [float("inf"), float("inf")]
    for turn in range(REPETITIONS + 1):
        for place, function in enumerate((ordinary, quantized)):
            begin = time.perf_counter()
            function()
            if turn:  # the first turn warms up
                best[place] = min(best[place], time.perf_counter() - begin)
    return best[0] / best[1]


def _measured_shape(m: int, in_features: int, out_features: int) -> tuple[int, int]:
    """Rows, rounded up to a power of two, and out_features to measure in place of the real ones."""
    features = max(1, min(out_features, LARGEST_WEIGHT // in_features))
    rows = 1 << (max(m, 1) - 1).bit_length()
    return min(rows, LARGEST_ROWS, max(1, LARGEST_PRODUCTS // (features * in_features))), features


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float32, device=CPU)


@functools.cache
def _mixed_ratio(dtype: torch.dtype, bits: int, rows: int, in_features: int, features: int) -> float:
    x = _random(rows, in_features).clamp_(-4, 4).to(dtype)
    weight = _random(features, in_features).to(dtype)
    codes, scale = quantize_weight(weight, WeightRecipe(TensorFormat(bits)))
    capacity = OutlierPolicy().capacity_for(in_features)
    state = OutlierState.create(in_features, capacity, DEFAULT_THRESHOLD, CPU)
    state.preload(range(min(capacity, in_features) // 2))
    given = {
        **state.named_buffers(),
        **_given(x, codes, scale),
        "outlier_weight": weight[:, :1].repeat(1, capacity),
        "format": "int8",
        "miss": "exact",
        "small_m": 0,
    }
    return _ratio_of_times(
        lambda: torch.nn.functional.linear(x, weight), lambda: compose(dict(given), refreshes=False)
    )


def _given(x: Tensor, codes: Tensor, scale: Tensor) -> dict[str, Any]:
    return {"x": x, "weight_codes": codes, "weight_scale": scale, "bias": None, "kernel": "cpu"}


@functools.cache
def _weight_only_ratio(dtype: torch.dtype, bits: int, rows: int, in_features: int, features: int) -> float:
    x = _random(rows, in_features).to(dtype)
    weight = _random(features, in_features).to(dtype)
    codes, scale = quantize_weight(weight, WeightRecipe(TensorFormat(bits)))
    return _ratio_of_times(
        lambda: torch.nn.functional.linear(x, weight),
        lambda: weight_only(_given(x, codes, scale)),
    )


def _ratio(
    measure: Callable[[torch.dtype, int, int, int, int], float], query: KernelQuery, m: int
) -> float | None:
    if query.in_features is None or query.out_features is None:
        return None
    rows, features = _measured_shape(m, query.in_features, query.out_features)
    with torch.no_grad():
        return measure(query.dtype, query.weight.bits, rows, query.in_features, features)


def mixed_speedup(query: KernelQuery, m: int) -> float | None:
    """Time of the ordinary linear over that of quantization and mixed linear together, at m rows."""
    return _ratio(_mixed_ratio, query, m)


def weight_only_speedup(query: KernelQuery, m: int) -> float | None:
    """Time of the ordinary linear over that of the weight-only one, at m rows."""
    return _ratio(_weight_only_ratio, query, m)
