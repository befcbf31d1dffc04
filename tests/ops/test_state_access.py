"""Who may change an outlier state when: in place where nobody else reads it, else on a copy that joins it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mixq_compile.errors import MixqError
from mixq_compile.ops import state_access
from mixq_compile.ops.state_access import StateAccess
from mixq_compile.ops.state_access import state_access as access_of


def state() -> tuple[Tensor, ...]:
    return tuple(torch.zeros(4, dtype=torch.int32) for _ in range(5))


def add_one(index: Tensor, *others: Tensor) -> None:
    index += 1


@contextmanager
def another_call(access: StateAccess) -> Iterator[None]:
    """A call of another thread, under way while the block runs."""
    begun, end = threading.Event(), threading.Event()

    def call() -> None:
        with access:
            begun.set()
            end.wait(10)

    thread = threading.Thread(target=call)
    thread.start()
    begun.wait(10)
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_a_call_that_is_alone_changes_the_state() -> None:
    access, buffers = StateAccess(), state()
    with access:
        assert access.learn(buffers, add_one) is buffers
    assert buffers[0].tolist() == [1] * 4


def test_beside_another_call_a_copy_changes_and_joins_when_all_have_ended() -> None:
    access, buffers = StateAccess(), state()
    with another_call(access):
        with access:
            changed = access.learn(buffers, add_one)
            assert changed[0].tolist() == [1] * 4
            assert buffers[0].tolist() == [0] * 4, "the other call reads this state"
            assert access.current(buffers) is changed, "the call must go on with its copy"
            assert access.learn(buffers, add_one)[0].tolist() == [2] * 4
        assert access.current(buffers) is buffers, "the copy outlives its call"
        assert buffers[0].tolist() == [0] * 4
    assert buffers[0].tolist() == [2] * 4, "what was learned is lost"


def test_what_concerns_one_call_alone_does_not_join() -> None:
    access, buffers = StateAccess(), state()
    with another_call(access), access:
        assert access.learn(buffers, add_one, remembered=False)[0].tolist() == [1] * 4
    assert buffers[0].tolist() == [0] * 4


def test_learning_for_later_calls_makes_no_copy() -> None:
    access, buffers = StateAccess(), state()
    with another_call(access), access:
        access.learn_later(buffers, add_one)
        assert access.current(buffers) is buffers
        assert buffers[0].tolist() == [0] * 4
    assert buffers[0].tolist() == [1] * 4


def test_copies_of_caches_begin_at_the_same_address() -> None:
    # Of two linears one below the other, the joint weight and the first one's begin at one address.
    access, buffers, joint = StateAccess(), state(), torch.zeros(6, 4)
    with another_call(access), access:
        access.learn(buffers, add_one)
        access.copy_cache(joint[:2]).fill_(1)
        access.copy_cache(joint).fill_(2)
        assert access.cache(joint[:2]).unique().tolist() == [1.0]
        assert access.cache(joint).unique().tolist() == [2.0]
    assert access.cache(joint) is joint
    assert joint.abs().sum() == 0


def test_calls_within_a_call_are_one() -> None:
    access, buffers = StateAccess(), state()
    with access:
        with access:
            pass
        with another_call(access):
            access.learn(buffers, add_one)
        assert access.has_copy(buffers[0])


def test_writers_wait_for_calls_under_way() -> None:
    access, order = StateAccess(), []

    def write() -> None:
        with access.exclusive():
            order.append("written")

    writer = threading.Thread(target=write)
    with another_call(access):
        writer.start()
        writer.join(0.1)
        order.append("the call ends")
    writer.join()
    assert order == ["the call ends", "written"]


def test_writers_get_their_turn_among_calls_that_never_pause() -> None:
    """Two threads whose calls overlap, so that without precedence there would never be none under way."""
    access, stop, written = StateAccess(), threading.Event(), threading.Event()
    inside = threading.Semaphore(0)

    def call_on_and_on() -> None:
        while not stop.is_set():
            with access:
                inside.release()
                stop.wait(0.002)

    def write() -> None:
        with access.exclusive():
            written.set()

    threads = [threading.Thread(target=call_on_and_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    inside.acquire()
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        assert written.wait(10), "the writer waits for ever"
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_call_that_never_ends_is_an_error_for_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_access, "EXCLUSIVE_SECONDS", 0.05)
    access = StateAccess()
    with another_call(access), pytest.raises(MixqError, match="write between calls"), access.exclusive():
        pass


def test_entering_never_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_access, "ENTRY_SECONDS", 0.05)
    access, buffers = StateAccess(), state()
    with another_call(access):
        with access:
            access.learn(buffers, add_one)
        with access:
            assert buffers[0].tolist() == [0] * 4


def test_an_error_in_a_call_ends_it() -> None:
    access, buffers = StateAccess(), state()
    with pytest.raises(ZeroDivisionError), access:
        raise ZeroDivisionError
    with access.exclusive():
        pass
    assert access.learn(buffers, add_one) is buffers


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")
def test_a_forked_process_has_none_of_the_calls() -> None:
    with another_call(state_access.STATES):
        child = os.fork()
        if not child:
            buffers = state()
            with state_access.STATES:
                alone = state_access.STATES.learn(buffers, add_one) is buffers
            os._exit(0 if alone else 1)
        assert os.waitpid(child, 0)[1] == 0, "the child waits for threads that it does not have"


def test_devices_have_the_access_that_they_need() -> None:
    first, second = (torch.device("cuda", number) for number in range(2))
    assert access_of(torch.device("cpu"), False) is state_access.STATES
    assert access_of(first, True) is access_of(first, True)
    assert access_of(first, True) is not access_of(second, True)
    assert access_of(first, False) is not access_of(first, True), "streams of a static model run at once"
