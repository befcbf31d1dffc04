"""Weight codes: packing, scales, the clip search, memory layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.ops.weight_codes import (
    aligned_empty,
    dequantize_weight,
    integer_codes,
    pack_int4,
    quantize_weight,
    unpack_int4,
    weight_bits,
)
from mixq_compile.scheme import WeightRecipe

EIGHT = WeightRecipe(TensorFormat(8))
FOUR = WeightRecipe(TensorFormat(4))
CLIPPED = WeightRecipe(TensorFormat(4), "clip")

shapes = st.tuples(st.integers(1, 9), st.integers(1, 40))


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_packing_two_codes_a_byte_loses_nothing(shape: tuple[int, int], seed: int) -> None:
    rows, columns = shape
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack_int4(packed, columns), codes)


def test_the_even_column_is_the_low_nibble_and_an_odd_end_is_zero() -> None:
    packed = pack_int4(torch.tensor([[1, -2, 7]], dtype=torch.int8))
    assert packed.tolist() == [[0x1 | 0xE << 4, 0x7]]


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 10**6),
    exponent=st.integers(-30, 30),
    recipe=st.sampled_from([EIGHT, FOUR]),
)
def test_absmax_codes_are_within_half_a_step(
    shape: tuple[int, int], seed: int, exponent: int, recipe: WeightRecipe
) -> None:
    weight = numbers(seed, *shape) * 2.0**exponent
    codes, scale = quantize_weight(weight, recipe)
    unpacked = integer_codes(codes, shape[1])
    assert int(unpacked.abs().max()) <= recipe.format.largest_code
    assert scale.dtype == torch.float32
    error = (dequantize_weight(codes, scale, shape[1]) - weight).abs()
    assert bool((error <= scale[:, None] * 0.5 * (1 + 1e-5)).all())
    torch.testing.assert_close(
        scale * recipe.format.largest_code, weight.abs().amax(dim=1), rtol=1e-6, atol=0
    )


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_the_clip_search_is_never_worse_than_no_clipping(shape: tuple[int, int], seed: int) -> None:
    weight = numbers(seed, *shape) ** 3

    def errors(recipe: WeightRecipe) -> Tensor:
        codes, scale = quantize_weight(weight, recipe)
        return (dequantize_weight(codes, scale, shape[1]) - weight).square().sum(dim=1)

    assert bool((errors(CLIPPED) <= errors(FOUR) * (1 + 1e-5) + 1e-12).all())


def test_the_clip_search_gains_on_a_weight_with_one_large_element() -> None:
    weight = numbers(0, 8, 256)
    weight[:, 0] = 6.0

    def error(recipe: WeightRecipe) -> float:
        codes, scale = quantize_weight(weight, recipe)
        return float((dequantize_weight(codes, scale, 256) - weight).square().mean())

    assert error(CLIPPED) < 0.8 * error(FOUR)


@pytest.mark.parametrize("recipe", [EIGHT, FOUR, CLIPPED], ids=["8", "4", "4 clipped"])
def test_a_zero_row_has_zero_codes_and_a_finite_scale(recipe: WeightRecipe) -> None:
    weight = numbers(0, 3, 20)
    weight[1] = 0.0
    codes, scale = quantize_weight(weight, recipe)
    assert not integer_codes(codes, 20)[1].any()
    assert bool((scale > 0).all())
    assert scale.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_is_quantized_in_fp32(dtype: torch.dtype) -> None:
    weight = numbers(0, 5, 33).to(dtype)
    codes, scale = quantize_weight(weight, EIGHT)
    reference = quantize_weight(weight.float(), EIGHT)
    assert torch.equal(codes, reference[0])
    assert torch.equal(scale, reference[1])


def test_a_transposed_weight_and_one_that_requires_grad_are_quantized() -> None:
    weight = torch.nn.Parameter(numbers(0, 33, 5))
    codes, scale = quantize_weight(weight.t(), EIGHT)
    assert codes.shape == (5, 33)
    assert not codes.requires_grad
    assert not scale.requires_grad


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("recipe", [EIGHT, FOUR], ids=["8", "4"])
def test_rows_begin_at_multiples_of_16_bytes(recipe: WeightRecipe, columns: int) -> None:
    codes, _ = quantize_weight(numbers(0, 3, columns), recipe)
    assert codes.stride(1) == 1
    assert codes.stride(0) % 16 == 0
    assert codes.data_ptr() % 16 == 0
    assert weight_bits(codes) == recipe.format.bits


def test_aligned_memory_keeps_leading_dimensions() -> None:
    made = aligned_empty((2, 3), 20, torch.int8, torch.device("cpu"))
    assert made.shape == (2, 3, 20)
    assert made.stride() == (96, 32, 1)
