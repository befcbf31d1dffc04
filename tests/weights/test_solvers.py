"""Solvers: which there are, that per-row results are those of the formulas, and what a search gains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixq_compile.errors import OptionError
from mixq_compile.formats import TensorFormat
from mixq_compile.scheme import SOLVERS, QuantScheme, WeightRecipe
from mixq_compile.weights.rounding import squared_error
from mixq_compile.weights.solvers.registry import get_solver

FORMATS = [
    TensorFormat.parse(text)
    for text in ("int8", "int4", "int2", "int4/16", "uint4", "uint4/16", "uint2/7", "mxint4/16", "mxint2/16")
]


def numbers(rows: int = 8, columns: int = 100, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3


def solved(name: str, matrix: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    return get_solver(name).solve(matrix, fmt, {})[:3]


def per_row(weight: Tensor, bits: int, clipped: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of the per-row formats, written out: what packed weights have always been."""
    largest_code, lowest = (127, -127) if bits == 8 else (7, -8)
    largest = weight.abs().amax(dim=1).clamp_min(2.0**-96)
    divisor = torch.full_like(largest, largest_code)
    best, best_error = largest / divisor, torch.full_like(largest, torch.inf)

    def codes(scale: Tensor) -> Tensor:
        return torch.round(weight / scale[:, None]).clamp(lowest, largest_code)

    for ratio in torch.linspace(1.0, 0.5, 41).tolist() if clipped else ():
        scale = (largest * ratio) / divisor
        error = (codes(scale) * scale[:, None] - weight).square().sum(dim=1)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return codes(best).to(torch.int8), best


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("power", [-120, -20, 0, 20])
@pytest.mark.parametrize("solver", ["absmax", "clip"])
@pytest.mark.parametrize("bits", [4, 8])
def test_per_row_codes_and_scales_are_these_bits(
    bits: int, solver: str, power: int, transposed: bool
) -> None:
    weight = numbers(100, 8).t() if transposed else numbers()
    weight = weight * 2.0**power
    weight[3] = 0
    codes, scale, zero = solved(solver, weight, TensorFormat(bits))
    expected = per_row(weight, bits, solver == "clip")
    assert zero is None
    assert torch.equal(scale, expected[1])
    assert torch.equal(codes, expected[0])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_search_is_never_worse_than_the_largest_magnitude(fmt: TensorFormat) -> None:
    weight = numbers()
    errors = [squared_error(weight, *solved(name, weight, fmt)[1:3], fmt) for name in ("clip", "absmax")]
    assert errors[0].shape == fmt.scale_shape(*weight.shape)
    assert bool((errors[0] <= errors[1]).all())


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=str)
def test_a_search_gains_where_one_element_is_large(fmt: TensorFormat) -> None:
    weight = torch.randn(8, 112, generator=torch.Generator().manual_seed(0))
    weight[:, ::7] *= 1.8
    errors = [
        squared_error(weight, *solved(name, weight, fmt)[1:3], fmt).sum() for name in ("clip", "absmax")
    ]
    assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_are_the_nearest_at_the_chosen_scale(fmt: TensorFormat) -> None:
    weight = numbers(2, 21)
    codes, scale, zero = solved("clip", weight, fmt)
    size = fmt.group or 21
    for row in range(2):
        for column in range(21):
            at = (row,) if fmt.group is None else (row, column // size)
            step = float(scale[at]) if fmt.scale == "float32" else 2.0 ** (int(scale[at]) - 126 - fmt.bits)
            shift = 0 if zero is None else int(zero[at])
            wanted = round(weight[row, column].item() / step) + shift
            wanted = min(max(wanted, fmt.lowest_code), fmt.largest_code)
            assert int(codes[row, column]) == wanted, (row, column)


def test_solvers_are_the_modules_of_the_folder() -> None:
    assert set(SOLVERS) >= {"absmax", "clip"}
    assert "registry" not in SOLVERS
    for name in SOLVERS:
        assert isinstance(get_solver(name).NEEDS, tuple)


def test_unknown_solvers_are_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="Did you mean 'clip'"):
        get_solver("clipp")
    with pytest.raises(OptionError, match="Did you mean 'absmax'"):
        WeightRecipe(TensorFormat(8), "absmx")
    with pytest.raises(OptionError, match="Valid: absmax, clip"):
        QuantScheme("mine", "one", TensorFormat(8), solver="gtpq")
