"""Who may read and change outlier states when: calls from several threads, and from several CUDA streams.

On a CPU a call reads a state in its quantization and again in the products that follow, so that a state
must not change between the two. A thread that is alone changes it in place. One that is not goes on with a
copy of its own, and what it has learned joins the state as soon as no call is under way. So calls never
wait for each other's arithmetic, and each is as exact as if it had run alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from mixq_compile.errors import MixqError
from mixq_compile.ops.providers import load_providers

State = tuple[Tensor, ...]
"""The buffers of a state, in the order of STATE_FIELDS."""
Change = Callable[..., None]
"""Changes the buffers of a state in place."""

ENTRY_SECONDS = 1.0
"""How long a call waits at most for others to end, so that what they learned can join the states."""
EXCLUSIVE_SECONDS = 60.0


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """Where a tensor lies: linears one below the other begin where the first of them does."""
    return tensor.data_ptr(), tensor.shape


class _Call(threading.local):
    """What one thread's call knows of itself."""

    def __init__(self) -> None:
        self.depth = 0
        self.copies: dict[int, State] = {}
        """This call's own copy of a state, by the address of the state's index."""
        self.caches: dict[tuple[int, torch.Size], Tensor] = {}
        """This call's own copy of an outlier weight or of what it holds, by the place of the original."""


class StateAccess:
    """Calls under way, the copies that they work on, and what waits to join the states.

    A context manager around one call on a CPU.
    """

    def __init__(self) -> None:
        self._call = _Call()
        self._forget_calls()

    def _forget_calls(self) -> None:
        """Makes everything anew: a forked process has none of the threads that were under way."""
        self._lock = threading.Lock()
        self.fetching = threading.Lock()
        """Held while caches of outlier weights are brought up to date or copied: a copy of one that is half
        written would name a column and hold another's weights."""
        self._quiet = threading.Condition(self._lock)
        self._active = 0
        self._writers = 0
        self._pending: list[tuple[Change, State]] = []
        self._call.__dict__.update(depth=0, copies={}, caches={})

    def __enter__(self) -> None:
        """Begins a call of this thread; calls within it belong to it."""
        call = self._call
        call.depth += 1
        if call.depth == 1:
            with self._lock:
                if self._pending or self._writers:
                    self._quiet.wait_for(lambda: not self._pending and not self._writers, ENTRY_SECONDS)
                self._active += 1

    def __exit__(self, *exception: object) -> None:
        """Ends the call; the last of all calls adds what they learned to the states."""
        call = self._call
        call.depth -= 1
        if call.depth:
            return
        if call.copies:
            call.copies, call.caches = {}, {}
        with self._lock:
            self._active -= 1
            if self._active == 0:
                pending, self._pending = self._pending, []
                for change, state in pending:
                    change(*state)
            self._quiet.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """A time in which no other thread's call is under way: for writing states, codes and caches.

        Raises MixqError where another call does not end within a minute.
        """
        own = 1 if self._call.depth else 0
        with self._lock:
            # Calls that would begin now wait: among many threads there may never be none under way.
            self._writers += 1
            try:
                if not self._quiet.wait_for(lambda: self._active <= own, EXCLUSIVE_SECONDS):
                    raise MixqError(
                        "quantized weights or outlier states are to be written, and a call of another thread "
                        f"has been reading them for {EXCLUSIVE_SECONDS:.0f} seconds: write between calls."
                    )
                yield
            finally:
                self._writers -= 1
                self._quiet.notify_all()

    def current(self, state: State) -> State:
        """The buffers that this thread's call reads: its copy where it has one."""
        return self._call.copies.get(state[0].data_ptr(), state) if self._call.copies else state

    def cache(self, outlier_weight: Tensor) -> Tensor:
        """The outlier weight that this thread's call reads: its copy where it has one."""
        caches = self._call.caches
        return caches.get(_place(outlier_weight), outlier_weight) if caches else outlier_weight

    def has_copy(self, index: Tensor) -> bool:
        """Whether this thread's call works on a copy of the state with this index."""
        return bool(self._call.copies) and index.data_ptr() in self._call.copies

    def own_caches(
        self, index: Tensor, cached_index: Sequence[Tensor], outlier_weight: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """The index and caches that this call may change: copies where it works on a copy of the state."""
        if not self.has_copy(index):
            return index, cached_index, outlier_weight
        cached_copies = [self.copy_cache(cache) for cache in cached_index]
        weight_copies = [self.copy_cache(cache) for cache in outlier_weight]
        return self.current((index,))[0], cached_copies, weight_copies

    def copy_cache(self, cache: Tensor) -> Tensor:
        """This call's own copy of an outlier weight, or of the list of its columns, made at its first use."""
        caches, place = self._call.caches, _place(cache)
        if place not in caches:
            caches[place] = cache.clone()
        return caches[place]

    def learn(self, state: State, change: Change, *, remembered: bool = True) -> State:
        """Changes a state, or this call's copy of it where others read it; returns what was changed.

        Args:
            state: the buffers, as the operator was given them.
            change: takes the buffers; is called again for the state itself where a copy was changed.
            remembered: False where the change concerns this call alone (policy `per_call`).
        """
        if self._change_in_place(state, change):
            return state
        copies = self._call.copies
        place = state[0].data_ptr()
        if place not in copies:
            copies[place] = tuple(buffer.clone() for buffer in state)
        change(*copies[place])
        if remembered:
            self._postpone(state, change)
        return copies[place]

    def learn_later(self, state: State, change: Change) -> None:
        """Changes a state for calls to come, as soon as none is under way: this one still reads it, too."""
        if self._call.depth or not self._change_in_place(state, change):
            self._postpone(state, change)

    def _change_in_place(self, state: State, change: Change) -> bool:
        own = 1 if self._call.depth else 0
        with self._lock:
            if not own:
                # An operator called by itself: there is no call that a copy could last for.
                self._quiet.wait_for(lambda: self._active == 0)
            if self._active > own or self.has_copy(state[0]):
                return False
            change(*state)
            return True

    def _postpone(self, state: State, change: Change) -> None:
        with self._lock:
            self._pending.append((change, state))


STATES = StateAccess()
"""Access to all outlier states of this process."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=STATES._forget_calls)


class StreamOrder:
    """Calls on one CUDA device that learn outlier columns, one after the other whatever their streams.

    A context manager around the launches of one call. Kernels of two streams would change a state at once,
    so that a call on another stream than the last one's waits, on the device, for what that one was given.
    While a graph is captured nothing waits: capturing begins with a synchronisation, and whoever replays
    graphs on several streams orders them.
    """

    _orders: ClassVar[dict[torch.device, AbstractContextManager[None]]] = {}
    make: ClassVar[Callable[[torch.device], AbstractContextManager[None]] | None] = None
    """Makes the orders in place of this class, where a provider launches without Python."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launching = threading.RLock()
        self._last: torch.cuda.Stream | None = None

    @classmethod
    def of(cls, device: torch.device) -> AbstractContextManager[None]:
        """The order of a device's calls."""
        if device not in cls._orders:
            load_providers()
            cls._orders.setdefault(device, (cls.make or cls)(device))
        return cls._orders[device]

    def __enter__(self) -> None:
        self._launching.acquire()
        current = torch.cuda.current_stream(self._device)
        if self._last == current or torch.cuda.is_current_stream_capturing():
            return
        if self._last is not None:
            current.wait_event(self._last.record_event())
        self._last = current

    def __exit__(self, *exception: object) -> None:
        self._launching.release()


LEARNING = ("exact", "lazy", "per_call")
"""The miss policies whose calls change states at any time; a `frozen` model learns while it is warmed up."""
_NOTHING = nullcontext()


def state_access(device: torch.device, learns: bool) -> AbstractContextManager[None]:
    """The context of a call that reads outlier states on this device and, if it learns, may change them.

    On a GPU kernels read what they were given in the order of their stream: only calls that learn need an
    order among several streams.
    """
    if device.type == "cuda":
        return StreamOrder.of(device) if learns else _NOTHING
    return STATES


def exclusive_access(device: torch.device) -> AbstractContextManager[None]:
    """The context of a write to states, codes or caches on this device, which no call then reads."""
    return StreamOrder.of(device) if device.type == "cuda" else STATES.exclusive()
