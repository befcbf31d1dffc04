"""SQNR, relative error and cosine, on numbers that can be checked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixq_compile.errors import OptionError
from mixq_compile.evaluation import mean_cosine, relative_error, sqnr

REFERENCE = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
ZERO = torch.zeros(2, 2)


def with_error(size: float) -> Tensor:
    return REFERENCE + torch.tensor([[0.0, 0.0], [size, 0.0]])


class TestSqnr:
    def test_an_error_of_one_percent_is_40_db(self) -> None:
        assert sqnr(REFERENCE, with_error(0.05)) == pytest.approx(40, abs=1e-5)

    def test_half_the_error_adds_6_db(self) -> None:
        gain = sqnr(REFERENCE, with_error(0.25)) - sqnr(REFERENCE, with_error(0.5))
        assert gain == pytest.approx(20 * math.log10(2))

    def test_equal_tensors(self) -> None:
        assert sqnr(REFERENCE, REFERENCE) == math.inf
        assert sqnr(ZERO, ZERO) == math.inf

    def test_a_zero_reference(self) -> None:
        assert sqnr(ZERO, REFERENCE) == -math.inf

    def test_nan(self) -> None:
        assert math.isnan(sqnr(REFERENCE, REFERENCE * math.nan))


class TestRelativeError:
    def test_it_is_the_norm_of_the_difference_over_that_of_the_reference(self) -> None:
        assert relative_error(REFERENCE, with_error(0.5)) == pytest.approx(0.1)

    def test_zeros(self) -> None:
        assert relative_error(ZERO, ZERO) == 0
        assert relative_error(ZERO, REFERENCE) == math.inf
        assert math.isnan(relative_error(ZERO, ZERO * math.nan))

    def test_half_precision_neither_overflows_nor_loses_the_difference(self) -> None:
        large = torch.full((1000,), 60000.0, dtype=torch.float16)
        assert relative_error(large, large - 32) == pytest.approx(32 / 60000)
        reference = torch.ones(1000, dtype=torch.bfloat16)
        assert relative_error(reference, torch.full((1000,), 1 + 2**-20)) == pytest.approx(2**-20)


class TestMeanCosine:
    def test_it_is_averaged_over_rows(self) -> None:
        a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
        b = torch.tensor([[5.0, 0.0], [0.0, 3.0], [-1.0, -1.0]])
        assert mean_cosine(a, b) == pytest.approx((1 + 0 - 1) / 3, abs=1e-12)

    def test_zero_rows(self) -> None:
        assert mean_cosine(REFERENCE, REFERENCE) == pytest.approx(1)
        assert mean_cosine(REFERENCE, with_error(1.0)) == pytest.approx(0.5)

    def test_leading_dimensions_are_rows(self) -> None:
        a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        assert mean_cosine(a, b) == pytest.approx(mean_cosine(a.reshape(6, 4), b.reshape(6, 4)))


@pytest.mark.parametrize("measure", [sqnr, relative_error, mean_cosine])
class TestErrors:
    def test_shapes_that_differ(self, measure: Callable[[Tensor, Tensor], float]) -> None:
        with pytest.raises(OptionError, match=r"\(2, 3\) and \(3,\)"):
            measure(torch.zeros(2, 3), torch.zeros(3))

    def test_nothing_to_compare(self, measure: Callable[[Tensor, Tensor], float]) -> None:
        with pytest.raises(OptionError, match="nothing to compare"):
            measure(torch.zeros(0, 3), torch.zeros(0, 3))
