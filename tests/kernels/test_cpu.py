"""The CPU provider against the reference, and against float64."""

from __future__ import annotations

import edge_cases
import pytest
import torch

from mixq_compile.kernels.cpu import availability

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("miss", edge_cases.POLICIES)
@pytest.mark.parametrize("name", edge_cases.ONLINE_CASES)
def test_learning_is_bit_identical(name, miss, dtype):
    case = edge_cases.ONLINE_CASES[name](dtype)
    expected = edge_cases.learn(case, "ref", miss, "cpu")
    edge_cases.assert_same(edge_cases.learn(case, "cpu", miss, "cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", edge_cases.ONLINE_CASES)
def test_fixed_columns_are_bit_identical(name, dtype):
    case = edge_cases.ONLINE_CASES[name](dtype)
    expected = edge_cases.quantize_fixed(case, "ref", "cpu")
    edge_cases.assert_same(edge_cases.quantize_fixed(case, "cpu", "cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", edge_cases.LINEAR_CASES)
def test_product(name, dtype):
    tensors = edge_cases.linear(edge_cases.LINEAR_CASES[name], dtype, "cpu")
    expected = edge_cases.expected_product(tensors)
    for found in (edge_cases.product(tensors, "cpu"), edge_cases.unfused_product(tensors, "cpu")):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **edge_cases.tolerance(dtype))


def test_available():
    assert availability.reason_unavailable() is None
