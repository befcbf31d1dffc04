"""`refresh_outlier_weights`: which columns a linear's cache holds after each call."""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.ops import refresh_outlier_weights
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.weight_codes import dequantize_weight, quantize_weight
from mixq_compile.scheme import WeightRecipe

CAPACITY = 80
IN_FEATURES = 100


class Cache:
    """The outlier cache of one linear."""

    def __init__(self, original: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(12, IN_FEATURES, generator=generator).to(dtype)
        self.codes, self.scale = quantize_weight(self.weight, WeightRecipe(TensorFormat(8)))
        self.original = self.weight if original else self.weight.new_empty(0)
        self.cached = torch.full((CAPACITY,), -1, dtype=torch.int32)
        self.columns = torch.zeros(12, CAPACITY, dtype=dtype)


def refresh(
    state: OutlierState, *caches: Cache, count: int | None = None, rows: int = 5, small_m: int = 0
) -> None:
    used = torch.tensor([len(state.columns()) if count is None else count], dtype=torch.int32)
    refresh_outlier_weights(
        torch.zeros(rows, IN_FEATURES, dtype=torch.int8), state.index, used,
        [c.cached for c in caches], [c.columns for c in caches], [c.codes for c in caches],
        [c.scale for c in caches], [c.original for c in caches], small_m, "ref",
    )  # fmt: skip


def state_of(*columns: int) -> OutlierState:
    state = OutlierState.create(IN_FEATURES, CAPACITY, 6.0, "cpu")
    state.preload(columns)
    return state


def expected(weight: Tensor, columns: list[int]) -> Tensor:
    found = torch.zeros(weight.shape[0], CAPACITY, dtype=weight.dtype)
    found[:, : len(columns)] = weight[:, columns]
    return found


def test_columns_come_from_the_original_weight_where_it_is_at_hand() -> None:
    cache = Cache(dtype=torch.bfloat16)
    refresh(state_of(2, 50), cache)
    assert torch.equal(cache.columns, expected(cache.weight, [2, 50]))
    assert cache.cached[:3].tolist() == [2, 50, -1]


def test_columns_are_rebuilt_from_the_codes_where_it_is_not() -> None:
    cache = Cache(original=False, dtype=torch.float16)
    refresh(state_of(2, 50), cache)
    rebuilt = dequantize_weight(cache.codes, cache.scale, IN_FEATURES).to(torch.float16)
    assert torch.equal(cache.columns, expected(rebuilt, [2, 50]))


def test_each_of_several_linears_has_its_own_columns() -> None:
    first, second = Cache(seed=1), Cache(seed=2, original=False)
    refresh(state_of(4, 9), first, second)
    assert torch.equal(first.columns, expected(first.weight, [4, 9]))
    rebuilt = dequantize_weight(second.codes, second.scale, IN_FEATURES)
    assert torch.equal(second.columns, expected(rebuilt, [4, 9]))


def test_only_slots_that_differ_are_fetched() -> None:
    cache = Cache()
    state = state_of(2, 50)
    refresh(state, cache)
    cache.columns[:, 0] = 7.0
    state.index[1] = 60
    refresh(state, cache)
    assert (cache.columns[:, 0] == 7.0).all(), "a slot that had not changed was fetched again"
    assert torch.equal(cache.columns[:, 1], cache.weight[:, 60]), "a replaced column was not fetched"


def test_only_the_columns_of_this_call_are_used() -> None:
    """Under `lazy` the state already holds columns that the call did not use."""
    cache = Cache()
    refresh(state_of(2, 50, 70), cache, count=1)
    assert torch.equal(cache.columns, expected(cache.weight, [2]))
    assert cache.cached[:3].tolist() == [2, -1, -1]


def test_slots_that_fell_out_of_use_are_zero_to_the_end_of_their_block() -> None:
    cache = Cache()
    refresh(state_of(*range(70)), cache)
    refresh(state_of(3), cache)
    assert torch.equal(cache.columns[:, :64], expected(cache.weight, [3])[:, :64])
    assert (cache.cached[1:64] == -1).all()
    refresh(state_of(*range(70)), cache)
    assert torch.equal(cache.columns, expected(cache.weight, list(range(70)))), "a zeroed slot stayed zero"


def test_nan_in_an_original_column_outside_the_call_does_not_leak() -> None:
    cache = Cache()
    cache.weight[:, 50] = torch.nan
    refresh(state_of(2, 50), cache)
    refresh(state_of(2), cache)
    assert cache.columns.isfinite().all()


def test_calls_of_few_rows_fetch_nothing() -> None:
    cache = Cache()
    refresh(state_of(2), cache, rows=4, small_m=4)
    assert (cache.cached == -1).all()
    refresh(state_of(2), cache, rows=5, small_m=4)
    assert int(cache.cached[0]) == 2


def test_a_cleared_cache_repairs_itself() -> None:
    cache = Cache()
    refresh(state_of(2, 50), cache)
    cache.weight.mul_(2.0)
    cache.cached.fill_(-1)
    refresh(state_of(2, 50), cache)
    assert torch.equal(cache.columns, expected(cache.weight, [2, 50]))


def test_linears_that_follow_each_other_may_have_one_outlier_weight() -> None:
    """Each still fetches by its own list of cached columns."""
    state, caches = state_of(2, 50), [Cache(seed=seed) for seed in range(3)]
    refresh(state, caches[1])
    together = torch.cat([cache.columns for cache in caches[:2]])
    arguments = (
        torch.zeros(5, IN_FEATURES, dtype=torch.int8), state.index, state.counters[:1].clone(),
        [c.cached for c in caches], [together, caches[2].columns], [c.codes for c in caches],
        [c.scale for c in caches], [c.original for c in caches], 0, "ref",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mixq.refresh_outlier_weights.default, arguments)
    refresh_outlier_weights(*arguments)
    for cache, found in zip(caches, (together[:12], together[12:], caches[2].columns), strict=True):
        assert torch.equal(found, expected(cache.weight, [2, 50]))
        assert cache.cached[:3].tolist() == [2, 50, -1]
