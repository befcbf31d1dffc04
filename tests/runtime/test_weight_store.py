"""`WeightStore`: one packed form and one state for all graphs, keyed by parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixq_compile.errors import MixqError
from mixq_compile.runtime.weight_store import WeightStore
from mixq_compile.schemes.registry import get_scheme

EIGHT, FOUR, PLAIN = get_scheme("w8a8o16"), get_scheme("w4a8o16"), get_scheme("w8a8")


def parameter(rows: int = 32, columns: int = 48) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(rows, columns), requires_grad=False)


def test_packing_again_gives_the_same_objects() -> None:
    store, weight = WeightStore(), parameter()
    assert store.pack(weight, EIGHT, torch.float32) is store.pack(weight, EIGHT, torch.float32)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [(EIGHT, torch.bfloat16), (EIGHT.with_outliers(capacity=32), torch.float32), (PLAIN, torch.float32)],
    ids=["dtype", "capacity", "no outliers"],
)
def test_other_caches_share_the_codes(scheme, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    store, weight = WeightStore(), parameter()
    one, other = store.pack(weight, EIGHT, torch.float32), store.pack(weight, scheme, dtype)
    assert one is not other
    assert one.stored is other.stored
    assert one.outlier_weight is not other.outlier_weight


def test_another_format_has_codes_of_its_own() -> None:
    store, weight = WeightStore(), parameter()
    eight, four = (store.pack(weight, scheme, torch.float32) for scheme in (EIGHT, FOUR))
    assert eight.stored is not four.stored
    assert len(store.codes(weight)) == 2


def test_a_weight_of_k_by_n_is_packed_as_n_by_k() -> None:
    store, weight = WeightStore(), parameter()
    plain = store.pack(weight, EIGHT, torch.float32)
    turned = store.pack(nn.Parameter(weight.t().contiguous()), EIGHT, torch.float32, transposed=True)
    assert torch.equal(plain.weight_codes, turned.weight_codes)
    assert torch.equal(plain.weight_scale, turned.weight_scale)


def test_states_are_keyed_by_their_readers() -> None:
    store, q, k = WeightStore(), parameter(), parameter()
    alone, both = store.state([q], EIGHT, 48), store.state([q, k], EIGHT, 48)
    assert alone is not both
    assert store.state([k, q], EIGHT, 48) is both, "the order of the readers made another state"
    assert store.state([q], EIGHT, 48) is alone
    assert {id(state) for state in store.states([k])} == {id(both)}


@pytest.mark.parametrize(
    "changes", [{"threshold": 3.0}, {"capacity": 32}, {"miss": "lazy"}], ids=lambda item: next(iter(item))
)
def test_another_policy_has_a_state_of_its_own(changes: dict[str, object]) -> None:
    store, weight = WeightStore(), parameter()
    state, other = store.state([weight], EIGHT, 48), store.state([weight], EIGHT.with_outliers(**changes), 48)
    assert state is not other


def test_calibrated_columns_start_a_state_of_their_own() -> None:
    store, weight = WeightStore(), parameter()
    plain = store.state([weight], EIGHT, 48)
    calibrated = store.state([weight], EIGHT, 48, [3, 7], [9.0, 8.0])
    assert plain.columns() == []
    assert calibrated.columns() == [3, 7]
    assert store.state([weight], EIGHT, 48, [3, 7], [9.0, 8.0]) is calibrated


@pytest.mark.parametrize(("miss", "frozen"), [("exact", 0), ("frozen", 1), ("static", 1)])
def test_calibrated_states_are_frozen_by_policy(miss: str, frozen: int) -> None:
    state = WeightStore().state([parameter()], EIGHT.with_outliers(miss=miss), 48, [3], [9.0])
    assert int(state.counters[3]) == frozen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_model_moved_to_another_device_is_packed_there() -> None:
    store, weight = WeightStore(), parameter()
    state, packed = store.state([weight], EIGHT, 48), store.pack(weight, EIGHT, torch.float32)
    weight.data = weight.data.cuda()
    assert store.state([weight], EIGHT, 48).index.device.type == "cuda"
    assert store.pack(weight, EIGHT, torch.float32).weight_codes.device.type == "cuda"
    assert state.index.device.type == packed.weight_codes.device.type == "cpu"


def test_filling_fetches_the_columns_of_the_state() -> None:
    store, weight = WeightStore(), parameter()
    packed = store.pack(weight, EIGHT, torch.bfloat16)
    store.fill(packed, weight, store.state([weight], EIGHT, 48, [3, 7]))
    assert torch.equal(packed.outlier_weight[:, :2], weight[:, [3, 7]].bfloat16())
    assert packed.cached_index[:3].tolist() == [3, 7, -1]


class TestRefresh:
    def test_nothing_written_is_nothing_done(self) -> None:
        store, weight = WeightStore(), parameter()
        store.pack(weight, EIGHT, torch.float32)
        assert not store.refresh(weight)
        assert not WeightStore().refresh(weight)

    @pytest.mark.parametrize("how", ["in place", "new storage"])
    def test_codes_and_cached_columns_follow_in_place(self, how: str) -> None:
        store, weight = WeightStore(), parameter()
        packed = store.pack(weight, EIGHT, torch.float32)
        store.fill(packed, weight, store.state([weight], EIGHT, 48, [3, 7]))
        addresses = [t.data_ptr() for t in (packed.weight_codes, packed.weight_scale, packed.outlier_weight)]
        if how == "in place":
            weight.mul_(-2.0)
        else:
            weight.data = weight.data * -2.0
        assert store.refresh(weight)
        fresh = WeightStore().pack(weight, EIGHT, torch.float32)
        assert torch.equal(packed.weight_codes, fresh.weight_codes)
        assert torch.equal(packed.weight_scale, fresh.weight_scale)
        assert torch.equal(packed.outlier_weight[:, :2], weight[:, [3, 7]])
        assert packed.cached_index[:3].tolist() == [3, 7, -1]
        assert addresses == [
            t.data_ptr() for t in (packed.weight_codes, packed.weight_scale, packed.outlier_weight)
        ]
        assert not store.refresh(weight)

    def test_every_format_follows(self) -> None:
        store, weight = WeightStore(), parameter()
        store.pack(weight, EIGHT, torch.float32)
        four = store.pack(weight, FOUR, torch.float32)
        weight.mul_(-1.0)
        store.refresh(weight)
        fresh = WeightStore().pack(weight, FOUR, torch.float32)
        assert torch.equal(four.weight_codes, fresh.weight_codes)

    def test_packing_finds_a_written_weight(self) -> None:
        store, weight = WeightStore(), parameter()
        store.pack(weight, EIGHT, torch.float32)
        weight.mul_(2.0)
        packed = store.pack(weight, EIGHT, torch.float32)
        torch.testing.assert_close(packed.weight_scale, weight.abs().amax(dim=1) / 127)


class TestBind:
    def test_both_see_what_either_writes(self) -> None:
        kept, bound = torch.arange(4), torch.zeros(4, dtype=torch.long)
        WeightStore().bind(kept, bound)
        assert bound.tolist() == [0, 1, 2, 3]
        bound[0] = 9
        assert kept[0] == 9

    def test_binding_twice_changes_nothing(self) -> None:
        kept, bound = torch.arange(4), torch.zeros(4, dtype=torch.long)
        WeightStore().bind(kept, bound)
        address = bound.data_ptr()
        WeightStore().bind(kept, bound)
        assert bound.data_ptr() == address


class TestRelease:
    def test_storage_is_gone_and_codes_stay(self) -> None:
        store, weight = WeightStore(), parameter()
        packed = store.pack(weight, EIGHT, torch.float32)
        store.release(weight)
        assert store.is_released(weight)
        assert weight.untyped_storage().nbytes() == 0
        assert store.pack(weight, EIGHT, torch.float32) is packed
        assert not store.refresh(weight), "a freed weight was packed again"

    def test_another_cache_can_still_be_made_but_no_other_codes(self) -> None:
        store, weight = WeightStore(), parameter()
        packed = store.pack(weight, EIGHT, torch.float32)
        store.release(weight)
        assert store.pack(weight, EIGHT, torch.bfloat16).stored is packed.stored
        with pytest.raises(MixqError, match=r"cannot be packed again with other options .scheme 'w4a8o16'."):
            store.pack(weight, FOUR, torch.float32)

    def test_filling_reads_no_freed_weight(self) -> None:
        store, weight = WeightStore(), parameter()
        packed = store.pack(weight, EIGHT, torch.float32)
        store.release(weight)
        store.fill(packed, weight, store.state([weight], EIGHT, 48, [3]))
        assert (packed.cached_index == -1).all(), "the cache says that it holds a column"


def test_bytes_count_codes_and_caches_once() -> None:
    store, weight = WeightStore(), parameter(32, 48)
    assert store.packed_bytes(weight) == 0
    store.pack(weight, EIGHT, torch.float32)
    codes, scale, cache, index = 32 * 48, 32 * 4, 32 * 16 * 4, 16 * 4
    assert store.packed_bytes(weight) == codes + scale + cache + index
    store.pack(weight, EIGHT, torch.bfloat16)
    assert store.packed_bytes(weight) == codes + scale + cache + index + cache // 2 + index


def test_meta_weights_are_packed_in_shape_only() -> None:
    store = WeightStore()
    weight = nn.Parameter(torch.empty(32, 47, device="meta"), requires_grad=False)
    for scheme, shape in ((EIGHT, (32, 47)), (FOUR, (32, 24))):
        packed = store.pack(weight, scheme, torch.bfloat16)
        assert packed.weight_codes.shape == shape
        assert packed.weight_codes.is_meta
    store.fill(packed, weight, store.state([weight], EIGHT, 47, [3]))


def test_entries_die_with_their_parameter() -> None:
    store, weight = WeightStore(), parameter()
    store.pack(weight, EIGHT, torch.float32)
    store.state([weight], EIGHT, 48)
    assert len(store._entries) == 1
    del weight
    assert len(store._entries) == 0
