"""Codes as bytes: the layout, and that nothing is lost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixq_compile.formats import TensorFormat
from mixq_compile.weights.packing import codes_dtype, pack, padded, unpack

FORMATS = ["int8", "int4", "int2", "uint8", "uint4", "uint2", "int4/128", "mxint4/16", "mxint2/16"]


@settings(max_examples=100, deadline=None)
@given(
    text=st.sampled_from(FORMATS),
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    seed=st.integers(0, 10**6),
)
def test_packing_loses_nothing(text: str, rows: int, columns: int, seed: int) -> None:
    fmt = TensorFormat.parse(text)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(fmt.lowest_code, fmt.largest_code + 1, (rows, columns), generator=generator)
    codes = codes.to(torch.int8 if fmt.signed else torch.uint8)
    packed = pack(codes, fmt)
    assert (packed.shape, packed.dtype) == (fmt.codes_shape(rows, columns), codes_dtype(fmt))
    assert packed.stride() == (padded(math.ceil(columns * fmt.bits / 8)), 1)
    found = unpack(packed, fmt, columns)
    assert found.dtype == codes.dtype
    assert torch.equal(found, codes)


@pytest.mark.parametrize(
    ("text", "codes", "packed"),
    [
        ("int4", [1, -2, 7], [0x1 | 0xE << 4, 0x7]),
        ("uint4", [1, 14, 15], [0x1 | 0xE << 4, 0xF]),
        ("int2", [1, -2, 0, -1, 1], [0b11_00_10_01, 0b01]),
        ("uint2", [1, 2, 0, 3, 3], [0b11_00_10_01, 0b11]),
        ("mxint2/16", [1, -1, 0, 0], [0b00_00_11_01]),
        ("int8", [1, -127], [1, -127]),
        ("uint8", [1, 255], [1, 255]),
    ],
)
def test_the_first_column_is_lowest_and_the_rest_of_a_byte_zero(
    text: str, codes: list[int], packed: list[int]
) -> None:
    fmt = TensorFormat.parse(text)
    given_codes = torch.tensor([codes], dtype=torch.int8 if fmt.signed else torch.uint8)
    assert pack(given_codes, fmt).tolist() == [packed]


def test_rows_are_padded_to_16_bytes() -> None:
    assert [padded(size) for size in (0, 1, 15, 16, 17, 32)] == [0, 16, 16, 16, 32, 32]
