"""Every format against its definition, computed number by number in Python's exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mixq_compile.errors import MixqError
from mixq_compile.formats import TensorFormat
from mixq_compile.weights.rounding import code_sums, codes_of, extremes, rounded, scale_of, values

INTEGERS = (
    "int8", "int4", "int2", "int8/16", "int4/16", "int2/5", "int4/64", "uint8", "uint4", "uint2", "uint4/16",
    "uint8/7", "uint2/5",
)  # fmt: skip
EXPONENTS = ("mxint8/16", "mxint4/16", "mxint2/16", "mxint4/5")


def numbers(rows: int = 4, columns: int = 40, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3
    made[1] = made[1].abs()  # Without a negative value,
    made[2] = -made[2].abs()  # and without a positive one.
    return made.to(dtype)


def groups(fmt: TensorFormat, columns: int) -> list[slice]:
    size = fmt.group or columns
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def simulated_integers(row: list[float], fmt: TensorFormat) -> tuple[list[float], list[int]]:
    """Values and codes less their zero point of one group, with the scale as fp32 rounds it."""
    if fmt.signed:
        largest = 2 ** (fmt.bits - 1) - 1
        scale = torch.tensor(max(map(abs, row)) / largest, dtype=torch.float64).float().item()
        codes = [round(Fraction(value) / Fraction(scale)) for value in row]
        return [code * scale for code in codes], codes
    low, high = min([0.0, *row]), max([0.0, *row])
    steps = 2**fmt.bits - 1
    span = torch.tensor(high - low, dtype=torch.float64).float()
    scale = (span / torch.tensor(float(steps))).item()
    zero = min(max(round(Fraction(-low) / Fraction(scale)), 0), steps)
    codes = [min(max(round(Fraction(value) / Fraction(scale)) + zero, 0), steps) for value in row]
    return [(code - zero) * scale for code in codes], [code - zero for code in codes]


@pytest.mark.parametrize("text", INTEGERS)
@pytest.mark.parametrize("columns", [40, 37])
def test_integers(text: str, columns: int) -> None:
    fmt, matrix = TensorFormat.parse(text), numbers(columns=columns)
    codes, scale, zero = rounded(matrix, fmt)
    assert (scale.shape, scale.dtype) == (fmt.scale_shape(4, columns), torch.float32)
    assert (zero is None) == fmt.signed
    assert codes.dtype == (torch.int8 if fmt.signed else torch.uint8)
    found, sums = values(codes, scale, zero, fmt), code_sums(codes, zero, fmt).reshape(4, -1)
    for row in range(4):
        for place, group in enumerate(groups(fmt, columns)):
            expected, centred = simulated_integers(matrix[row, group].tolist(), fmt)
            torch.testing.assert_close(
                found[row, group].double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-7, atol=0
            )
            assert int(sums[row, place]) == sum(centred)


@pytest.mark.parametrize("text", EXPONENTS)
@pytest.mark.parametrize("columns", [40, 37])
@pytest.mark.parametrize("power", [-140, -100, 0, 110])
def test_shared_exponents(text: str, columns: int, power: int) -> None:
    """Bit for bit: exponents are integers and codes have few bits."""
    fmt = TensorFormat.parse(text)
    matrix = (numbers(columns=columns).double() * 2.0**power).float()
    codes, scale, zero = rounded(matrix, fmt)
    assert zero is None
    assert (scale.shape, scale.dtype) == (fmt.scale_shape(4, columns), torch.uint8)
    found, magnitudes = values(codes, scale, None, fmt), 2 ** (fmt.bits - 1)
    for row in range(4):
        for place, group in enumerate(groups(fmt, columns)):
            block = [Fraction(value) for value in matrix[row, group].tolist()]
            largest, exponent = max(map(abs, block)), -127
            while exponent < 128 and Fraction(2) ** exponent < largest:
                exponent += 1
            assert int(scale[row, place]) - 127 == exponent
            for value, got in zip(block, found[row, group].tolist(), strict=True):
                magnitude = min(round(abs(value) / Fraction(2) ** exponent * magnitudes), magnitudes - 1)
                wanted = magnitude * Fraction(2) ** exponent / magnitudes
                assert Fraction(got) == (wanted if value >= 0 else -wanted)


@pytest.mark.parametrize(
    ("text", "row", "expected"),
    [
        ("int2", [-1.0, 0.3, 0.5, 1.0], [-1.0, 0.0, 0.0, 1.0]),
        ("int8", [-1.0, 0.5, 1.0], [-1.0, 64 / 127, 1.0]),
        ("int4/2", [7.0, 1.4, 70.0, 14.0], [7.0, 1.0, 70.0, 10.0]),
        ("uint2", [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]),
        ("uint4", [-5.0, 10.0, 0.4, 0.6], [-5.0, 10.0, 0.0, 1.0]),
        ("uint4", [15.0, 30.0, 14.0, 1.1], [16.0, 30.0, 14.0, 2.0]),
        ("mxint2/16", [-1.0, 0.3, 0.5, 1.0], [-0.5, 0.5, 0.5, 0.5]),
        ("mxint2/16", [0.24, 0.25, -0.26, 1.0], [0.0, 0.0, -0.5, 0.5]),
        ("mxint4/16", [3.0, 0.25, 0.26, -3.0], [3.0, 0.0, 0.5, -3.0]),
        ("mxint4/2", [4.0, 3.0, 4.1, 3.0], [3.5, 3.0, 4.0, 3.0]),
    ],
)
def test_by_hand(text: str, row: list[float], expected: list[float]) -> None:
    fmt = TensorFormat.parse(text)
    assert values(*rounded(torch.tensor([row]), fmt), fmt).tolist()[0] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("power", [-126, -60, 0, 100, 127])
def test_an_exponent_is_exact_where_a_logarithm_is_rounded(power: int) -> None:
    exactly = torch.tensor([[2.0**power]], dtype=torch.float32)
    above = torch.nextafter(exactly, torch.tensor(torch.inf))
    fmt = TensorFormat.parse("mxint8/1")
    found = [int(rounded(each, fmt)[1]) - 127 for each in (exactly, above)]
    assert found == [power, power + 1]


@pytest.mark.parametrize("text", [*INTEGERS, *EXPONENTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_stay_zero_and_scales_finite(text: str, dtype: torch.dtype) -> None:
    fmt, matrix = TensorFormat.parse(text), numbers(dtype=dtype)
    matrix[1:3] = 0
    codes, scale, zero = rounded(matrix, fmt)
    found = values(codes, scale, zero, fmt, dtype)
    assert found.dtype == dtype
    assert not found[1:3].any()
    assert bool((values(torch.ones_like(codes), scale, None, fmt, dtype) > 0).all())


@pytest.mark.parametrize("text", INTEGERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_not_hidden(text: str, bad: float) -> None:
    fmt, matrix = TensorFormat.parse(text), numbers()
    matrix[1, 2] = bad
    found, expected = values(*rounded(matrix, fmt), fmt), values(*rounded(numbers(), fmt), fmt)
    group = groups(fmt, 40)[0 if fmt.group is None else 2 // fmt.group]
    assert found[1, group].isnan().all()
    found[1, group] = expected[1, group]
    assert torch.equal(found, expected), "a value that is not finite reached another group"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_shared_exponent_refuses_values_that_are_not_finite(bad: float) -> None:
    matrix = numbers()
    matrix[1, 2] = bad
    with pytest.raises(MixqError, match="NaN or infinity"):
        rounded(matrix, TensorFormat.parse("mxint4/16"))


@pytest.mark.parametrize("text", [*INTEGERS, *EXPONENTS])
def test_the_nearest_code_is_chosen(text: str) -> None:
    """No other code of a group's grid is nearer than the one chosen."""
    fmt, matrix = TensorFormat.parse(text), numbers()
    codes, scale, zero = rounded(matrix, fmt)
    error = (values(codes, scale, zero, fmt) - matrix).abs()
    for code in range(fmt.lowest_code, fmt.largest_code + 1):
        other = (values(torch.full_like(codes, code), scale, zero, fmt) - matrix).abs()
        slack = 0 if fmt.signed else 1  # Rounding the zero point too may cost up to half a step.
        step = values(torch.ones_like(codes), scale, None, fmt)
        assert bool((error <= other + step * slack / 2 + error * 1e-5).all())


@pytest.mark.parametrize("text", ["int4", "uint4/16", "mxint4/16"])
def test_given_scales_clip(text: str) -> None:
    fmt, matrix = TensorFormat.parse(text), numbers()
    low, high = extremes(matrix, fmt)
    scale, zero = scale_of(low / 4, high / 4, fmt)
    codes = codes_of(matrix, scale, zero, fmt)
    assert int(codes.min()) >= fmt.lowest_code
    assert int(codes.max()) == fmt.largest_code


def test_lowest_codes() -> None:
    texts = ("int8", "int4", "int2", "uint8", "uint4", "mxint8/16", "mxint4/16", "mxint2/16")
    found = [TensorFormat.parse(text).lowest_code for text in texts]
    assert found == [-127, -8, -2, 0, 0, -127, -7, -1]
