"""The switch to the weight-only path: where it lies, and that all operators have it in the same place."""

from __future__ import annotations

import pytest
import torch

from mixq_compile import ops
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.providers import providers_of
from mixq_compile.ops.small_batch import is_small_batch

KERNELS = [entry.name for entry in providers_of("mixed_linear") if entry.name != "tl"]


@pytest.mark.parametrize(
    ("shape", "small_m", "expected"),
    [
        ((4, 8), 4, True), ((5, 8), 4, False), ((2, 2, 8), 4, True), ((5, 1, 8), 4, False), ((8,), 1, True),
        ((0, 8), 4, True), ((1, 8), 0, False), ((0, 8), 0, False),
    ],
)  # fmt: skip
def test_rows_are_all_leading_dimensions(shape: tuple[int, ...], small_m: int, expected: bool) -> None:
    assert is_small_batch(torch.empty(shape), small_m) is expected


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "small"), [(0, True), (3, True), (4, True), (5, False)])
def test_all_operators_switch_at_the_same_number_of_rows(kernel: str, rows: int, small: bool) -> None:
    torch.manual_seed(0)
    x, small_m = torch.randn(rows, 32), 4
    x[:, 3] = 12.0
    state = OutlierState.create(32, 16, 6.0, "cpu")
    codes, scale = torch.randint(-9, 9, (24, 32), dtype=torch.int8), torch.rand(24)
    cached, held = torch.full((16,), -1, dtype=torch.int32), torch.zeros(24, 16)
    found = ops.quantize_online(x, *state.buffers(), "int8", "exact", small_m, kernel)
    ops.refresh_outlier_weights(
        found[0], state.index, found[3], [cached], [held], [codes], [scale], [torch.empty(0)], small_m, kernel
    )
    result = ops.mixed_linear(x, *found, codes, scale, held, None, small_m, kernel)
    in_16_bit = ops.weight_only_linear(x, codes, scale, None, kernel)
    assert state.columns() == ([] if small else [3]), "quantization learned, or did not"
    assert cached[0] == (-1 if small else 3), "the outlier weights were fetched, or were not"
    assert torch.equal(result, in_16_bit) == small, "the product took the other path"
    assert result.shape == (rows, 24)


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_switch_point_no_rows_are_no_small_batch(kernel: str) -> None:
    """A fused quantization reads no x, of which it has none to give to the weight-only path."""
    state = OutlierState.create(32, 16, 6.0, "cpu")
    codes, scale = torch.zeros(24, 32, dtype=torch.int8), torch.ones(24)
    found = ops.quantize_online(torch.empty(0, 32), *state.buffers(), "int8", "exact", 0, kernel)
    outliers_for_x = found[2]
    result = ops.mixed_linear(outliers_for_x, *found, codes, scale, torch.zeros(24, 16), None, 0, kernel)
    assert result.shape == (0, 24)
