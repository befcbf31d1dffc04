"""The Triton provider in Triton's interpreter, on the CPU: `TRITON_INTERPRET=1 pytest <this file>`.

The interpreter multiplies the raw bits of bfloat16 in `tl.dot`, and truncates where it rounds to
bfloat16, so products are checked in fp16 and fp32 here and in bf16 on a GPU.
"""

from __future__ import annotations

import os
import zlib

import edge_cases
import pytest
import torch

from mixq_compile import ops
from mixq_compile.errors import KernelError
from mixq_compile.ops.outlier_state import OutlierState

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="runs with TRITON_INTERPRET=1, in its own process"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _some_dtype(*names: str) -> torch.dtype:
    """One of the dtypes, spread evenly over the cases: all of each would take minutes."""
    return DTYPES[zlib.crc32("".join(names).encode()) % len(DTYPES)]


@pytest.mark.parametrize("name", edge_cases.ONLINE_CASES)
@pytest.mark.parametrize("miss", edge_cases.POLICIES)
def test_learning_is_bit_identical(name, miss):
    case = edge_cases.ONLINE_CASES[name](_some_dtype(name, miss))
    expected = edge_cases.learn(case, "ref", miss, "cpu")
    edge_cases.assert_same(edge_cases.learn(case, "tl", miss, "cpu"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("miss", edge_cases.POLICIES)
def test_padding_teaches_nothing(miss, dtype):
    edge_cases.check_padding_teaches_nothing("tl", miss, dtype, "cpu")


@pytest.mark.parametrize("name", edge_cases.ONLINE_CASES)
def test_fixed_columns_are_bit_identical(name):
    case = edge_cases.ONLINE_CASES[name](_some_dtype(name))
    expected = edge_cases.quantize_fixed(case, "ref", "cpu")
    edge_cases.assert_same(edge_cases.quantize_fixed(case, "tl", "cpu"), expected)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("holds", [False, True])
def test_rows_of_several_parts(holds, ahead, monkeypatch):
    from mixq_compile.kernels.tl import quantization

    share = quantization.Share(1, 1, holds, ahead)
    monkeypatch.setattr(quantization, "ELEMENTS_PER_THREAD", 1)
    monkeypatch.setattr(quantization, "share_rows", lambda rows, columns: share)
    for name in ("ragged_columns", "not_finite"):
        case = edge_cases.ONLINE_CASES[name](torch.bfloat16)
        expected = edge_cases.learn(case, "ref", "exact", "cpu")
        edge_cases.assert_same(edge_cases.learn(case, "tl", "exact", "cpu"), expected)


def test_no_row_exceeds_after_an_exact_call():
    case = edge_cases.ONLINE_CASES["more_than_the_capacity"](torch.float32)
    last = edge_cases.learn(case, "tl", "exact", "cpu")[-1]
    assert last["counters"][1] > 0
    assert last["scale"].max() * 127 <= last["effective_threshold"] * (1 + 1e-6)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_few_rows_learn_nothing(rows):
    state = OutlierState.create(32, 16, 6.0, "cpu")
    x = torch.full((rows, 32), 50.0)
    codes, scale, outliers, _ = ops.quantize_online(x, *state.buffers(), "int8", "exact", 3, "tl")
    assert (codes.shape, scale.shape, outliers.shape) == ((rows, 32), (rows,), (rows, 16))
    assert state.columns() == []


@pytest.mark.parametrize("name", edge_cases.LINEAR_CASES)
def test_outlier_weights_are_bit_identical(name):
    for dtype in (torch.float16, torch.float32):
        caches = []
        for kernel in ("ref", "tl"):
            tensors = edge_cases.linear(edge_cases.LINEAR_CASES[name], dtype, "cpu")
            edge_cases.refresh(tensors, kernel)
            caches.append((tensors.cached_index, tensors.outlier_weight))
        assert torch.equal(caches[0][0], caches[1][0])
        assert torch.equal(caches[0][1], caches[1][1])


def test_outlier_weights_follow_the_state():
    edge_cases.check_refresh_follows_the_state("tl", torch.float16, "cpu")


@pytest.mark.parametrize("name", edge_cases.LINEAR_CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_mixed_linear(name, dtype):
    tensors = edge_cases.linear(edge_cases.LINEAR_CASES[name], dtype, "cpu")
    found = edge_cases.product(tensors, "tl")
    assert found.dtype == dtype
    expected = edge_cases.expected_product(tensors)
    torch.testing.assert_close(found.double(), expected, **edge_cases.tolerance(dtype))


@pytest.mark.parametrize("small_m", [0, 1000])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("function", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activation_functions(function, gated, small_m):
    """Without the Hopper kernel: the product, then its function."""
    tensors = edge_cases.linear(edge_cases.LINEAR_CASES["originals"], torch.float16, "cpu")
    found = edge_cases.activated_product(tensors, "tl", function, gated, small_m)
    wanted = edge_cases.expected_weight_only if small_m else edge_cases.expected_product
    expected = edge_cases.expected_activation(wanted(tensors), function, gated)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)
    same = edge_cases.activated_product(tensors, "ref", function, gated, small_m)
    torch.testing.assert_close(found, same, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", edge_cases.LINEAR_CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weight_only(name, dtype):
    tensors = edge_cases.linear(edge_cases.LINEAR_CASES[name], dtype, "cpu")
    found = edge_cases.product(tensors, "tl", small_m=1000)
    expected = edge_cases.expected_weight_only(tensors)
    torch.testing.assert_close(found.double(), expected, **edge_cases.tolerance(dtype))


@pytest.mark.parametrize("name", ["ragged_beyond_a_tile", "four_bits_ragged", "no_slots", "three_dimensions"])
def test_unfused_products(name):
    tensors = edge_cases.linear(edge_cases.LINEAR_CASES[name], torch.float16, "cpu")
    found = edge_cases.unfused_product(tensors, "tl")
    expected = edge_cases.expected_product(tensors)
    torch.testing.assert_close(found.double(), expected, **edge_cases.tolerance(torch.float16))


@pytest.mark.parametrize("rows", [3, 70])
def test_tensor_descriptors(rows, monkeypatch):
    from mixq_compile.kernels.tl import mixed_linear

    monkeypatch.setattr(
        mixed_linear,
        "launch_pointers",
        lambda *arguments: mixed_linear.launch_descriptors(
            *arguments[:-1], mixed_linear.Tile(32, 64, 64, 4, 2)
        ),
    )
    tensors = edge_cases.linear(edge_cases.LinearCase(rows, 83, 88, originals=True), torch.float16, "cpu")
    found = edge_cases.product(tensors, "tl")
    expected = edge_cases.expected_product(tensors)
    torch.testing.assert_close(found.double(), expected, **edge_cases.tolerance(torch.float16))


def test_rows_that_are_not_finite_spoil_no_other():
    edge_cases.check_not_finite_rows("tl", torch.float16, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absurd_rows_teach_nothing(dtype):
    edge_cases.check_absurd_rows_teach_nothing("tl", dtype, "cpu")


def test_sums_beyond_half_precision():
    edge_cases.check_large_sums("tl", "cpu", rows=4, in_features=2048, out_features=16)


def test_needs_the_interpreter_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    state = OutlierState.create(32, 16, 6.0, "cpu")
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        ops.quantize_online(torch.ones(2, 32), *state.buffers(), "int8", "exact", 0, "tl")
