"""Looking, while a graph runs, for writes to its weights that torch does not count."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mixq_compile.runtime.derived_weights import DerivedWeight
from mixq_compile.runtime.stored_weight import StoredWeight
from mixq_compile.runtime.weight_content import block, block_count, content_sum
from mixq_compile.runtime.weight_store import STORE

SHARE = 0.005
"""The part of a graph's time that looking at its weights may take."""
COSTLIEST = 4.0
"""A look that took more than so many times the cheapest one was interrupted, and is not counted whole."""


_WATCHES: weakref.WeakSet[WeightWatch] = weakref.WeakSet()


class WeightWatch:
    """Compares a block of one weight at a time with what was packed, as often as its share of time allows.

    On a GPU the comparison is launched and its outcome read at a later look: nothing waits.
    """

    def __init__(self, weights: Sequence[tuple[int, Tensor, StoredWeight | DerivedWeight]]) -> None:
        """Watches weights, each with its place among a graph's arguments and what was computed from it."""
        self._weights = [(place, codes) for place, _, codes in weights]
        self._watched = [weakref.ref(weight) for _, weight, _ in weights]
        self._blocks = [
            (number, place)
            for number, (_, weight, _) in enumerate(weights)
            for place in range(block_count(weight))
        ]
        self._next = 0
        self._credit = 0.0
        self._cheapest = _seconds_of_a_look(weights[0][1]) if weights else 0.0
        self._look_seconds, self._looks = self._cheapest, 1
        self._first_look = self._cheapest
        self._call_seconds = 0.0
        self.calls = 0
        """How often the graph has run."""
        self._looking = threading.Lock()
        self._outcome: tuple[int, Tensor, torch.cuda.Event] | None = None
        _WATCHES.add(self)

    @property
    def calls_until_seen(self) -> int | None:
        """After how many calls every weight has been looked at, at the pace so far; None before the first."""
        if not self._blocks or not self.calls:
            return None
        needed = len(self._blocks) * self._look_seconds / self._looks
        return max(len(self._blocks), math.ceil(needed / (SHARE * self._call_seconds / self.calls)))

    @property
    def share(self) -> float:
        """The part of the graph's time that looking has taken."""
        return (self._look_seconds - self._first_look) / self._call_seconds if self.calls else 0.0

    def watches(self, weights: Iterable[Tensor]) -> bool:
        """Whether one of these is among its weights."""
        wanted = {id(weight) for weight in weights}
        return any(id(weight) in wanted for reference in self._watched if (weight := reference()) is not None)

    def ran(self, seconds: float) -> None:
        """Counts a call of the graph that took so long on the host."""
        self.calls += 1
        self._call_seconds += seconds
        self._credit += SHARE * seconds

    def look(self, arguments: Sequence[Tensor]) -> None:
        """Looks at the next block if its share of time allows, and packs a weight again that was written."""
        if not self._blocks or self._credit < self._cheapest or not self._looking.acquire(blocking=False):
            return
        try:
            begin = time.perf_counter()
            written = self._look(arguments)
            seconds = time.perf_counter() - begin
            self._cheapest = min(self._cheapest, seconds)
            counted = min(seconds, COSTLIEST * self._cheapest)
            self._credit = min(self._credit, self._cheapest) - counted
            self._looks += 1
            self._look_seconds += counted
            if written is not None:
                STORE.refresh(arguments[written], look=True)
        finally:
            self._looking.release()

    def _look(self, arguments: Sequence[Tensor]) -> int | None:
        """The place of a weight that was written; None where none was seen."""
        number, block_place = self._blocks[self._next]
        place, codes = self._weights[number]
        weight = arguments[place]
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        seen = self._seen()
        if self._outcome is not None:
            return None
        self._next = (self._next + 1) % len(self._blocks)
        if codes.content is not None and codes.content.device == weight.device:
            differs = content_sum(block(weight, block_place)) != codes.content[block_place]
            if not weight.is_cuda:
                return place if bool(differs) else seen
            host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            host.copy_(differs, non_blocking=True)
            self._outcome = place, host, torch.cuda.current_stream(weight.device).record_event()
        return seen

    def _seen(self) -> int | None:
        """What the comparison launched before has found, once the device has made it."""
        if self._outcome is None or not self._outcome[2].query():
            return None
        place, differs, _ = self._outcome
        self._outcome = None
        return place if bool(differs) else None


def _seconds_of_a_look(weight: Tensor) -> float:
    """How long looking at the first block of a weight takes on the host."""
    best = math.inf
    for _ in range(2):
        begin = time.perf_counter()
        content_sum(block(weight, 0))
        best = min(best, time.perf_counter() - begin)
    return best


def calls_until_seen(weights: Sequence[Tensor]) -> int | None:
    """After how many calls of its graph a write to any of these weights is seen; None where not known."""
    counts = [watch.calls_until_seen for watch in _WATCHES if watch.watches(weights)]
    return max((count for count in counts if count is not None), default=None)
