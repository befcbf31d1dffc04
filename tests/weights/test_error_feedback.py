"""`error_feedback`: columns make up for the errors of those before, as a float64 oracle does one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixq_compile.errors import StatisticsError
from mixq_compile.formats import TensorFormat
from mixq_compile.scheme import WeightRecipe
from mixq_compile.weights import rounding
from mixq_compile.weights.recipe import make
from mixq_compile.weights.solvers import clipped_feedback, error_feedback

FORMATS = ("int8", "int4", "int4/16", "uint4/16", "uint8", "int2/16", "uint4", "int4/64", "int4/100")


def inputs(columns: int, rows: int = 400, seed: int = 0) -> Tensor:
    """Inputs whose channels go together, and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )
    own = torch.randn(rows, columns, generator=generator)
    return (mixed + 0.3 * own) * torch.logspace(-1, 1, columns)


def weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))


def gram(x: Tensor) -> Tensor:
    return (x.double().T @ x.double()).float()


def oracle(matrix: Tensor, fmt: TensorFormat, moment: Tensor) -> Tensor:
    """The rounded weight: optimal brain quantization, column by column, the inverse updated in between.

    Another way to the same numbers: no Cholesky factor and no blocks.
    """
    if fmt.group is None:  # the loudest channels first
        order = moment.diagonal().argsort(descending=True)
        grouped = TensorFormat(fmt.bits, matrix.shape[1], fmt.signed)
        return oracle(matrix[:, order], grouped, moment[order][:, order])[:, order.argsort()]
    columns = matrix.shape[1]
    damped = moment.double() + torch.eye(columns) * 0.01 * moment.double().diagonal().mean()
    inverse = torch.linalg.inv(damped)
    left, found = matrix.double().clone(), torch.zeros_like(matrix, dtype=torch.float64)
    size = fmt.group or columns
    one = TensorFormat(fmt.bits, None, fmt.signed)
    for place in range(columns):
        if place % size == 0:
            scale, zero = rounding.scale_of(
                *rounding.extremes(left[:, place : place + size].float(), one), one
            )
        codes = rounding.codes_of(left[:, place : place + 1].float(), scale, zero, one)
        found[:, place] = rounding.values(codes, scale, zero, one)[:, 0].double()
        error = (left[:, place] - found[:, place]) / inverse[place, place]
        left[:, place:] -= error[:, None] * inverse[place, place:][None]
        inverse -= torch.outer(inverse[:, place], inverse[place]) / inverse[place, place]
    return found


def values(matrix: Tensor, fmt: TensorFormat, moment: Tensor) -> Tensor:
    return rounding.values(*error_feedback.solve(matrix, fmt, {"gram": moment})[:3], fmt)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("columns", [48, 160])
def test_it_is_what_the_oracle_finds(columns: int, text: str) -> None:
    fmt, matrix, moment = TensorFormat.parse(text), weight(12, columns), gram(inputs(columns))
    found, wanted = values(matrix, fmt, moment).double(), oracle(matrix, fmt, moment)
    # Where a value lies on the edge between two codes, rounding errors decide, and all behind it differ.
    rows = ((found - wanted).abs().amax(dim=1) < 1e-5).double().mean()
    assert rows >= 0.7, f"only {rows:.0%} of the rows are the oracle's"
    assert (found - wanted).norm() < 0.05 * (matrix - found).norm() + 1e-4


@pytest.mark.parametrize("text", ["int8", "int4", "int4/16", "uint4/16"])
def test_outputs_on_the_inputs_are_nearer_than_by_rounding(text: str) -> None:
    fmt, matrix, x = TensorFormat.parse(text), weight(64, 128), inputs(128)
    exact = x @ matrix.T
    by_feedback = (x @ values(matrix, fmt, gram(x)).T - exact).norm() / exact.norm()
    nearest = (x @ rounding.values(*rounding.rounded(matrix, fmt), fmt).T - exact).norm() / exact.norm()
    assert by_feedback < (0.6 if "/" not in text else 0.85) * nearest, (
        f"{by_feedback:.4f} beside {nearest:.4f}"
    )


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    fmt, matrix = TensorFormat(8), weight(16, 96)
    found = error_feedback.solve(matrix, fmt, {"gram": torch.eye(96) * 3})
    for mine, nearest in zip(found[:2], rounding.rounded(matrix, fmt)[:2], strict=True):
        assert torch.equal(mine, nearest)


def test_channels_that_no_input_reaches_are_rounded_to_nearest() -> None:
    fmt, matrix, x = TensorFormat(8), weight(16, 96), inputs(96)
    x[:, [3, 95]] = 0
    codes, scale, *_ = error_feedback.solve(matrix, fmt, {"gram": gram(x)})
    nearest = rounding.codes_of(matrix, scale, None, fmt)
    assert torch.equal(codes[:, [3, 95]], nearest[:, [3, 95]])
    assert not torch.equal(codes, nearest)


def test_fewer_rows_than_channels_are_enough() -> None:
    fmt, matrix, x = TensorFormat(4), weight(32, 128), inputs(128, rows=20)
    exact = x @ matrix.T
    nearest = rounding.values(*rounding.rounded(matrix, fmt), fmt)
    assert (x @ values(matrix, fmt, gram(x)).T - exact).norm() < 0.5 * (x @ nearest.T - exact).norm()


def test_a_recipe_takes_it_by_name() -> None:
    matrix, x = weight(16, 64), inputs(64)
    recipe = WeightRecipe.parse("int4/16 error_feedback")
    made = make(recipe, matrix, torch.float32, {"gram": gram(x)})
    assert torch.equal(made.rounded(recipe.format, 64), values(matrix, recipe.format, gram(x)))
    with pytest.raises(StatisticsError, match=r"needs the gram .* calibrate"):
        make(recipe, matrix, torch.float32)


def test_statistics_that_do_not_fit_are_refused() -> None:
    matrix = weight(8, 32)
    for wrong, message in (
        (torch.eye(31), "must be 32 times 32"),
        (torch.full((32, 32), torch.nan), "finite"),
        (-torch.eye(32), "is no second moment|must be"),
    ):
        if wrong.shape == (32, 32) and bool((wrong.diagonal() < 0).all()):
            wrong = torch.eye(32) - 2 * torch.ones(32, 32)  # its diagonal is negative too: no channel counts
        with pytest.raises(StatisticsError, match=message):
            error_feedback.solve(matrix, TensorFormat(8), {"gram": wrong})


def test_a_weight_that_is_not_finite_is_rounded_as_ever() -> None:
    matrix = weight(8, 32)
    matrix[2, 5] = torch.nan
    found = values(matrix, TensorFormat(8), torch.eye(32))
    assert found[2].isnan().all()
    assert found[[0, 1, 3]].isfinite().all()


KEPT = [3, 92, 94, 95]


def with_kept(fmt: TensorFormat, matrix: Tensor, moment: Tensor, solver: Any = error_feedback) -> Tensor:
    """The weight `[N, K]` of codes and kept columns."""
    found = solver.solve(matrix, fmt, {"gram": moment, "kept_columns": torch.tensor(KEPT)})
    rounded = rounding.values(found.codes, found.scale, found.zero, fmt)
    rounded[:, KEPT] = found.kept
    return rounded


def test_kept_columns_are_the_best_for_the_codes_beside_them() -> None:
    """What is left of the others' errors is projected onto the kept ones: least squares in float64."""
    fmt, matrix, x = TensorFormat(4), weight(24, 96), inputs(96)
    found = with_kept(fmt, matrix, gram(x)).double()
    rest = [column for column in range(96) if column not in KEPT]
    moment = gram(x).double()
    moment += torch.eye(96) * 0.01 * moment.diagonal().mean()
    lost = (matrix.double() - found)[:, rest]
    best = matrix.double()[:, KEPT] + lost @ moment[rest][:, KEPT] @ torch.linalg.inv(moment[KEPT][:, KEPT])
    assert (found[:, KEPT] - best).norm() < 1e-3 * best.norm()
    assert (found[:, KEPT] - matrix[:, KEPT]).norm() > 0.01 * best.norm(), "they made up for nothing"


@pytest.mark.parametrize("solver", [error_feedback, clipped_feedback], ids=["error", "clipped"])
def test_kept_columns_lower_the_error(solver: Any) -> None:
    fmt, matrix, x = TensorFormat(4), weight(64, 96), inputs(96)
    exact, moment = x @ matrix.T, gram(x)
    whole = rounding.values(*solver.solve(matrix, fmt, {"gram": moment})[:3], fmt)
    originals = whole.clone()
    originals[:, KEPT] = matrix[:, KEPT]
    found = with_kept(fmt, matrix, moment, solver)
    errors = [(x @ each.T - exact).norm() for each in (found, whole, originals)]
    assert errors[0] < 0.9 * min(errors[1:]), errors


@pytest.mark.parametrize("solver", [error_feedback, clipped_feedback], ids=["error", "clipped"])
def test_a_weight_of_which_all_columns_are_kept_is_the_original(solver: Any) -> None:
    """A linear as narrow as its slots: there is nothing to make up for."""
    matrix, fmt = weight(8, 16), TensorFormat(4)
    every = torch.arange(16)
    found = solver.solve(matrix, fmt, {"gram": gram(inputs(16)), "kept_columns": every})
    assert torch.equal(found.kept, matrix)
    assert torch.equal(found.codes, rounding.rounded(matrix, fmt)[0])


def test_clipped_scales_are_weighed_by_the_inputs() -> None:
    """A large weight of a channel that hardly speaks is clipped for the sake of the others."""
    fmt, matrix = TensorFormat(4), weight(16, 64)
    matrix[:, 5] *= 8
    quiet = torch.ones(64)
    quiet[5] = 1e-6
    scales = [
        clipped_feedback.solve(matrix, fmt, {"gram": torch.diag(each)}).scale
        for each in (quiet, torch.ones(64))
    ]
    assert float((scales[0] < 0.7 * scales[1]).double().mean()) > 0.5
