"""What a linear costs before and after quantization, by a roofline: the slower of computing and moving.

The time is `max(operations / rate, bytes / bandwidth)` over whole products: no launches, no caches, no
partial waves. It ranks layers and shows where memory or arithmetic decides; it is no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mixq_compile.errors import OptionError
from mixq_compile.inspection.layers import LayerSummary
from mixq_compile.scheme import WeightRecipe
from mixq_compile.weights.recipe import packed_bytes

ROWS = (1, 256, 2048)
"""Numbers of rows M that costs are shown for: decoding, a batch, a prefill."""
MEGA = 1e6


@dataclass(frozen=True)
class DeviceFigures:
    """What a device reaches, in multiplications and additions a second (2 for each product) and bytes."""

    name: str
    float_rate: float
    """In the model's own dtype: fp32 on a CPU, 16 bit on a GPU."""
    integer_rate: float
    """In int8."""
    bandwidth: float
    """Bytes a second, read and written."""

    def __post_init__(self) -> None:
        for field in ("float_rate", "integer_rate", "bandwidth"):
            if not getattr(self, field) > 0:
                raise OptionError(f"the {field.replace('_', ' ')} of a device must be above 0.")


H200 = DeviceFigures("NVIDIA H200", float_rate=775e12, integer_rate=1519e12, bandwidth=4297e9)
"""Measured: cuBLAS bf16 and this package's product at 11008×4096, 4096 rows; a copy in device memory."""


def linear_cost(layer: LayerSummary, rows: int, device: DeviceFigures) -> dict[str, Any]:
    """Operations, bytes moved and expected microseconds of one linear at M = `rows`.

    Returns `operations`, and `bytes` and `microseconds` each `before` and `after`; after quantization the
    cheaper of the integer product (quantization included) and the weight-only one is taken.
    """
    n, k, element = layer.out_features, layer.in_features, _float_bits(layer) // 8
    operations = 2 * rows * n * k
    outer = rows * (n + k) * element  # x and the result
    moved = outer + n * k * element
    before = _microseconds(operations / device.float_rate, moved, device)
    after, moved_after = before, moved
    if layer.scheme is not None:
        ways = _quantized(layer, rows, device)
        after, moved_after = min((_microseconds(seconds, size, device), size) for seconds, size in ways)
    return {
        "operations": operations,
        "bytes": {"before": moved, "after": moved_after},
        "microseconds": {"before": before, "after": after},
    }


def _quantized(layer: LayerSummary, rows: int, device: DeviceFigures) -> list[tuple[float, int]]:
    """Seconds of arithmetic and bytes of each way to compute a quantized linear."""
    n, k, bits = layer.out_features, layer.in_features, _float_bits(layer)
    element, dtype = bits // 8, torch.float32 if bits == 32 else torch.bfloat16
    written = layer.recipe or f"int{layer.weight_bits} absmax"  # files of older releases say no more
    recipe = WeightRecipe.parse(written)
    operations, outer = 2 * rows * n * k, rows * (n + k) * element
    ways = [(operations / device.float_rate, outer + packed_bytes(recipe, n, k, dtype, 0))]
    if layer.activation_bits <= 8:
        # x is read once; its codes and outlier columns are written, then read by the product.
        codes = rows * (k + layer.capacity * element)
        moved = outer + 2 * codes + packed_bytes(recipe, n, k, dtype, layer.capacity)
        outlier_operations = 2 * rows * n * layer.capacity
        seconds = operations / device.integer_rate + outlier_operations / device.float_rate
        ways.append((seconds, moved))
    return ways


def costs_of(layer: LayerSummary, device: DeviceFigures) -> dict[str, Any]:
    """The cost of one linear at each of ROWS, by the number of rows as a text; empty without its shape."""
    if not layer.out_features or not layer.in_features:
        return {}
    return {str(rows): linear_cost(layer, rows, device) for rows in ROWS}


def _float_bits(layer: LayerSummary) -> int:
    return 32 if layer.dtype == "float32" else 16


def _microseconds(seconds: float, moved: float, device: DeviceFigures) -> float:
    return round(max(seconds, moved / device.bandwidth) * MEGA, 3)
