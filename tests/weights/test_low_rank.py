"""Low-rank factors of rounding errors: nearest of their rank, weighted by channels, the same in each run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixq_compile.errors import MixqError
from mixq_compile.weights import low_rank
from mixq_compile.weights.low_rank import channel_weights, factors


def numbers(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(48, 32), (32, 48), (7, 7)])
@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_is_the_whole_error(rows: int, columns: int, weighted: bool) -> None:
    error = numbers(rows, columns)
    weights = channel_weights(numbers(1, rows, 1)[0].abs() * 100) if weighted else None
    left, right = factors(error, 1000, weights)
    assert (left.dtype, right.dtype) == (torch.float32, torch.float32)
    assert left.shape == (rows, min(rows, columns))
    assert right.shape == (min(rows, columns), columns)
    torch.testing.assert_close(left @ right, error, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 20])
def test_the_rest_is_what_the_other_singular_values_say(rank: int) -> None:
    error = numbers(48, 32)
    left, right = factors(error, rank)
    rest = float((left.double() @ right.double() - error.double()).square().sum())
    singular = torch.linalg.svdvals(error.double())
    assert rest == pytest.approx(float(singular[rank:].square().sum()), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 20])
def test_weights_make_it_nearest_in_the_weighted_error(rank: int) -> None:
    error, weights = numbers(48, 32), channel_weights(numbers(1, 48, 1)[0].abs() * 10)
    weighted = weights.double()[:, None] * error.double()

    def rest(factored: tuple[Tensor, Tensor]) -> float:
        difference = factored[0].double() @ factored[1].double() - error.double()
        return float((weights.double()[:, None] * difference).square().sum())

    expected = float(torch.linalg.svdvals(weighted)[rank:].square().sum())
    assert rest(factors(error, rank, weights)) == pytest.approx(expected, rel=1e-5)
    assert rest(factors(error, rank)) > 1.02 * expected


@pytest.mark.parametrize("rank", [4, 12])
def test_random_projections_come_close(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_SIZE", 0)
    error = numbers(200, 160)
    left, right = factors(error, rank)
    rest = float((left.double() @ right.double() - error.double()).square().sum())
    best = float(torch.linalg.svdvals(error.double())[rank:].square().sum())
    assert best <= rest < 1.005 * best


def test_factors_do_not_depend_on_nor_change_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_SIZE", 0)
    error, found = numbers(100, 80), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(factors(error, 4))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_weights_of_channels_by_hand() -> None:
    found = channel_weights(torch.tensor([1.0, 4.0, 0.0, 2.0]))
    # Clamped at 1e-4, then divided by sqrt(1e-4 * 4) = 0.02.
    torch.testing.assert_close(found, torch.tensor([50.0, 200.0, 0.005, 100.0]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_error_that_is_not_finite_is_refused(bad: float) -> None:
    error = numbers(8, 8)
    error[2, 3] = bad
    with pytest.raises(MixqError, match="NaN or infinity"):
        factors(error, 2)
