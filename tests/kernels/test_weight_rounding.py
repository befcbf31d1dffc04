"""The fused rounding of weights gives the bits of the specification, at every width, dtype and magnitude."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixq_compile.kernels.cpu import weight_rounding
from mixq_compile.kernels.cpu.availability import reason_unavailable
from mixq_compile.scheme import WeightRecipe
from mixq_compile.weights import recipe as recipes

pytestmark = pytest.mark.skipif(reason_unavailable() is not None, reason="there is no C++ compiler")

INT8, INT4 = WeightRecipe.parse("int8 absmax"), WeightRecipe.parse("int4 absmax")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_same(weight: Tensor, recipe: WeightRecipe) -> None:
    found = weight_rounding.round_rows(weight, recipe)
    assert found is not None
    expected = recipes.make(recipe, weight, weight.dtype)
    assert torch.equal(found[1].view(torch.int32), expected.scale.view(torch.int32)), "scales differ"
    wrong = (found[0] != expected.codes).nonzero()
    assert not len(wrong), f"{len(wrong)} codes differ, the first at {wrong[0].tolist()}"


@pytest.mark.parametrize("recipe", [INT8, INT4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 33, 172, 4096])
def test_random_weights(recipe: WeightRecipe, dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    assert_same(torch.randn(65, columns, generator=generator).to(dtype), recipe)


@pytest.mark.parametrize("recipe", [INT8, INT4], ids=str)
def test_ties_round_to_even(recipe: WeightRecipe) -> None:
    largest = recipe.format.largest_code
    halves = torch.arange(-2 * largest, 2 * largest + 1) / 2
    assert_same(halves[None].repeat(3, 1), recipe)


@pytest.mark.parametrize("recipe", [INT8, INT4], ids=str)
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 2.0**-97, 2.0**-96, 1.0, 3e38])
def test_magnitudes_of_every_size(recipe: WeightRecipe, magnitude: float) -> None:
    generator = torch.Generator().manual_seed(1)
    assert_same((torch.rand(9, 40, generator=generator) * 2 - 1) * magnitude, recipe)


def test_every_bfloat16_value_beside_every_largest() -> None:
    patterns = torch.arange(0, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert_same(patterns[None].contiguous(), INT8)
    rows = torch.stack([patterns[begin : begin + 255] for begin in range(0, 0x7F00, 255)])
    for recipe in (INT8, INT4):
        assert_same(rows.contiguous(), recipe)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_left_to_the_specification(value: float) -> None:
    weight = torch.randn(4, 33)
    weight[2, 32] = value
    assert weight_rounding.round_rows(weight, INT8) is None


@pytest.mark.parametrize(
    "text", ["int8 clip", "int8/32 absmax", "uint8 absmax", "int8 absmax rank=4", "int2 absmax"]
)
def test_other_recipes_are_not_served(text: str) -> None:
    assert not weight_rounding.serves(WeightRecipe.parse(text), torch.float32)
    assert weight_rounding.serves(INT8, torch.bfloat16)
    assert not weight_rounding.serves(INT8, torch.float64)
