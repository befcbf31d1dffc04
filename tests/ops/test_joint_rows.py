"""`joint_rows`: parts of one memory, found by their addresses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mixq_compile.ops.joint_rows import held_bytes, join_rows, joinable, row_order
from mixq_compile.ops.weight_codes import aligned_empty


def parts(*rows: int, columns: int | None = 7) -> list[Tensor]:
    """Tensors of so many rows, each in memory of its own."""
    if columns is None:
        return [torch.randn(count) for count in rows]
    return [
        aligned_empty((count,), columns, torch.int8, torch.device("cpu")).copy_(
            torch.randint(-127, 128, (count, columns))
        )
        for count in rows
    ]


@pytest.mark.parametrize("columns", [7, 16, None])
def test_parts_keep_their_values_and_become_views(columns: int | None) -> None:
    held = parts(4, 2, 5, columns=columns)
    before = [part.clone() for part in held]
    whole = join_rows(held)
    assert torch.equal(whole, torch.cat(before))
    assert len({part.untyped_storage().data_ptr() for part in (whole, *held)}) == 1
    for part, value in zip(held, before, strict=True):
        assert torch.equal(part, value)
        part.fill_(1)
    assert bool((whole == 1).all())


def test_rows_stay_aligned() -> None:
    held = parts(4, 2)
    whole = join_rows(held)
    assert all(tensor.stride(0) == 16 and tensor.data_ptr() % 16 == 0 for tensor in (whole, *held))


def test_no_second_copy_is_kept() -> None:
    held = parts(4, 2)
    alone = sum(part.untyped_storage().nbytes() for part in held)
    whole = join_rows(held)
    assert whole.untyped_storage().nbytes() == alone
    assert sum(held_bytes(part) for part in held) == alone


def test_joining_again_finds_the_same_memory() -> None:
    held = parts(4, 2, 3)
    assert join_rows(held).data_ptr() == join_rows(held).data_ptr()


def test_a_run_of_joined_parts_is_joined_already() -> None:
    held = parts(4, 2, 3)
    whole = join_rows(held)
    assert joinable(held[1:])
    assert torch.equal(join_rows(held[1:]), whole[4:])
    assert join_rows(held[1:]).data_ptr() == held[1].data_ptr()


def test_the_order_is_that_in_memory() -> None:
    held = parts(4, 2, 3)
    assert row_order([held[2], held[0], held[1]]) == [0, 1, 2]
    join_rows(held)
    assert row_order([held[2], held[0], held[1]]) == [1, 2, 0]


def test_what_lies_beside_others_cannot_be_joined() -> None:
    first, second, third = parts(4, 2, 3)
    join_rows([first, second])
    assert not joinable([first, third])
    assert not joinable([second, first])
    assert not joinable([first, second, third])


def test_a_copy_is_joined_too_and_on_its_own() -> None:
    held = parts(4, 2)
    whole = join_rows(held)
    copies = copy.deepcopy(held)
    assert joinable(copies)
    assert torch.equal(join_rows(copies), whole)
    copies[0].fill_(9)
    assert not torch.equal(held[0], copies[0])


def test_parts_without_memory() -> None:
    assert join_rows([torch.zeros(4, 0), torch.zeros(2, 0)]).shape == (6, 0)
    meta = [part.to("meta") for part in parts(4, 2)]
    assert joinable(meta)
    assert join_rows(meta).shape == (6, 7)
    assert join_rows(meta).is_meta
