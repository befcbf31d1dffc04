"""`mixq::quantize_affine`: codes with zero points, against QUIK's rule written out number by number."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mixq_compile import ops
from mixq_compile.errors import KernelError, OptionError
from mixq_compile.formats import INT8, TensorFormat
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.providers import KernelQuery, choose

K, C = 45, 16
COLUMNS = (3, 40)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) ** 3


def state_with(columns: tuple[int, ...] = COLUMNS) -> OutlierState:
    state = OutlierState.create(K, C, 6.0, "cpu")
    state.preload(columns)
    return state


def call(x: Tensor, format: str = "uint8", state: OutlierState | None = None) -> tuple[Tensor, ...]:
    state = state or state_with()
    found: tuple[Tensor, ...] = ops.quantize_affine(
        x, state.index, state.column_slot, state.counters, format, "ref"
    )
    return found


def values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return scale.double()[..., None] * (codes.double() - zero.double()[..., None])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0, 100.0])
def test_the_rule(bits: int, shift: float) -> None:
    """`scale = (max - min) / (2^bits - 1)` over what is no outlier column, the range widened to 0."""
    x = numbers(6, K) + shift
    x[:, list(COLUMNS)] = 1000.0
    codes, scale, zero, outliers = call(x, f"uint{bits}")
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float32, torch.int32)
    largest, offset = 2**bits - 1, 2 ** (bits - 1)
    inside = [column for column in range(K) if column not in COLUMNS]
    for row in range(6):
        line = x[row, inside].tolist()
        low, high = min([0.0, *line]), max([0.0, *line])
        span = torch.tensor(high) - torch.tensor(low)
        assert float(scale[row]) == float(span / torch.tensor(float(largest)))
        inverse = Fraction(float(torch.tensor(float(largest)) / span))
        offset_of_zero = round(float(torch.tensor(float(Fraction(-low) * inverse))))
        assert int(zero[row]) == offset_of_zero - offset
        assert -offset <= int(zero[row]) < offset
        for column in inside:
            scaled = torch.tensor(float(Fraction(x[row, column].item()) * inverse), dtype=torch.float32)
            code = min(max(round(scaled.item()) + offset_of_zero, 0), largest) - offset
            assert int(codes[row, column]) == code
    assert torch.equal(outliers[:, : len(COLUMNS)], x[:, list(COLUMNS)])
    assert not outliers[:, len(COLUMNS) :].any()


def test_by_hand() -> None:
    x = torch.zeros(1, K)
    x[0, :4] = torch.tensor([-5.0, 10.0, 0.4, 50.0])
    codes, scale, zero, outliers = call(x, "uint4")
    assert scale.tolist() == [1.0]
    assert zero.tolist() == [5 - 8]
    assert codes[0, :5].tolist() == [0 - 8, 15 - 8, 5 - 8, 5 - 8, 5 - 8]
    assert outliers[0, :2].tolist() == [50.0, 0.0]


@pytest.mark.parametrize(("bits", "loss"), [(8, 255), (4, 15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_come_back_within_a_step(bits: int, loss: int, dtype: torch.dtype) -> None:
    """Half a step for the code and, at the ends of the range, half a step for the zero point."""
    x = numbers(2, 3, K).to(dtype)
    found = values(*call(x, f"uint{bits}")[:3])
    found[..., list(COLUMNS)] = x[..., list(COLUMNS)].double()
    inner = x.double().clone()
    inner[..., list(COLUMNS)] = 0
    span = inner.amax(-1).clamp_min(0) - inner.amin(-1).clamp_max(0)
    assert bool(((found - x.double()).abs() <= span[..., None] / loss * 1.001).all())


def test_a_range_on_one_side_has_twice_as_many_steps_as_one_with_a_sign() -> None:
    x = numbers(64, K).relu()
    affine = values(*call(x, "uint4")[:3])
    state = state_with()
    codes, scale, _ = ops.quantize(x, state.index, state.column_slot, state.counters, "int4", 0, "ref")
    symmetric = scale.double()[:, None] * codes.double()
    inside = [column for column in range(K) if column not in COLUMNS]
    errors = [(found - x)[:, inside].square().mean() for found in (affine, symmetric)]
    assert float(errors[0]) < 0.35 * float(errors[1])


@pytest.mark.parametrize("format", ["uint8", "uint4"])
def test_outlier_columns_have_the_code_of_zero(format: str) -> None:
    codes, _, zero, _ = call(numbers(6, K) + 1, format)
    for column in COLUMNS:
        assert torch.equal(codes[:, column].int(), zero)


@pytest.mark.parametrize("format", ["uint8", "uint4"])
def test_rows_of_zeros_are_zeros(format: str) -> None:
    x = numbers(3, K)
    x[1] = 0
    codes, scale, zero, _ = call(x, format)
    assert not values(codes, scale, zero)[1].any()
    assert bool((scale > 0).all())


@pytest.mark.parametrize("column", [7, COLUMNS[0]])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_scale_nan(bad: float, column: int) -> None:
    x = numbers(3, K)
    expected = call(x.clone())
    x[1, column] = bad
    found = call(x)
    assert found[1].isnan().tolist() == [False, True, False]
    for mine, wanted in zip(found, expected, strict=True):
        assert torch.equal(mine[[0, 2]], wanted[[0, 2]])


def test_a_range_beyond_fp32_has_scale_nan() -> None:
    x = numbers(2, K)
    x[1, 5], x[1, 6] = 3e38, -3e38
    assert call(x)[1].isnan().tolist() == [False, True]


def test_it_learns_nothing() -> None:
    state = state_with()
    before = [buffer.clone() for buffer in state.buffers()]
    call(numbers(4, K) * 100, state=state)
    for now, then in zip(state.buffers(), before, strict=True):
        assert torch.equal(now, then)


def test_without_rows() -> None:
    codes, scale, zero, outliers = call(numbers(0, K))
    assert [tuple(each.shape) for each in (codes, scale, zero, outliers)] == [(0, K), (0,), (0,), (0, C)]


@pytest.mark.parametrize("format", ["int8", "uint2", "uint4/16", "mxint4/16"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(OptionError, match=f"uint8 or uint4.*, not {format}"):
        call(numbers(2, K), format)
    query = KernelQuery(
        "quantize_affine", torch.device("cpu"), torch.float32, INT8, TensorFormat.parse(format)
    )
    with pytest.raises(KernelError, match="it writes uint8 and uint4"):
        choose(query)
