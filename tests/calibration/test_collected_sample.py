"""The kind `sample`: a seeded reservoir of the finite rows of each linear's input."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from mixq_compile.calibration import calibrate
from mixq_compile.calibration.collected.sample import ROWS, SampleAccumulator

CPU = torch.device("cpu")


def numbered_rows(count: int) -> Tensor:
    """Rows of which each holds its own place."""
    return torch.arange(count, dtype=torch.float32)[:, None].expand(-1, 3)


def sampled(rows: Tensor, *splits: int, size: int = 8, seed: int = 0) -> Tensor:
    """The sample of rows that came in parts of these sizes, or together."""
    accumulator = SampleAccumulator(rows.shape[1], CPU, size, seed)
    for part in rows.split(list(splits) or [rows.shape[0]]):
        accumulator.add(part)
    return accumulator.value()


def test_fewer_rows_than_it_holds_are_all_there_in_order() -> None:
    assert torch.equal(sampled(numbered_rows(5)), numbered_rows(5))
    assert torch.equal(sampled(numbered_rows(8)), numbered_rows(8))


@pytest.mark.parametrize("splits", [(1,) * 1000, (8, 992), (3, 6, 1, 990), (999, 1), (500, 500)])
def test_it_does_not_depend_on_how_batches_split_the_rows(splits: tuple[int, ...]) -> None:
    assert torch.equal(sampled(numbered_rows(1000), *splits), sampled(numbered_rows(1000)))


def test_it_holds_different_rows_in_the_order_in_which_they_came() -> None:
    places = sampled(numbered_rows(1000))[:, 0].tolist()
    assert len(places) == 8
    assert places == sorted(set(places))
    assert set(places) <= set(range(1000))


def test_it_is_the_same_in_every_release() -> None:
    assert sampled(numbered_rows(1000))[:, 0].tolist() == [45, 144, 378, 406, 450, 572, 837, 987]


def test_another_seed_gives_another_sample() -> None:
    assert not torch.equal(sampled(numbered_rows(1000)), sampled(numbered_rows(1000), seed=1))


@pytest.mark.parametrize("size", [1, 4])
def test_every_row_is_as_likely_as_any_other(size: int) -> None:
    """Twenty rows over 3000 seeds: each is there size / 20 of the times, within five deviations."""
    counts: Counter[float] = Counter()
    for seed in range(3000):
        counts.update(sampled(numbered_rows(20), size=size, seed=seed)[:, 0].tolist())
    share = size / 20
    deviation = (3000 * share * (1 - share)) ** 0.5
    assert all(abs(counts[place] - 3000 * share) < 5 * deviation for place in range(20)), counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_s_sample_holds_rows_of_its_input_in_fp32_on_the_cpu(dtype: torch.dtype) -> None:
    x = torch.randn(2 * ROWS, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    entry = calibrate(nn.Sequential(nn.Linear(6, 4)).to(dtype), [x], kinds=("sample",))["0"]
    assert (entry.sample.dtype, entry.sample.device.type) == (torch.float32, "cpu")
    assert entry.sample.shape == (ROWS, 6)
    rows = {tuple(row) for row in x.float().tolist()}
    assert all(tuple(row) in rows for row in entry.sample.tolist())


def test_linears_keep_rows_of_the_same_places() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(2 * x)

    stats = calibrate(Two(), [numbered_rows(3 * ROWS)], kinds=("sample",))
    assert torch.equal(stats["second"].sample, 2 * stats["first"].sample)


def test_rows_that_are_not_finite_take_no_place() -> None:
    x = numbered_rows(6).clone()
    x[2, 1] = float("nan")
    with pytest.warns(UserWarning, match="NaN or infinity"):
        entry = calibrate(nn.Sequential(nn.Linear(3, 4)), [x], kinds=("sample",))["0"]
    assert entry.sample[:, 0].tolist() == [0, 1, 3, 4, 5]
