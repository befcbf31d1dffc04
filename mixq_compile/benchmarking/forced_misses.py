"""Calls that meet a new outlier column as often as asked: what the policy `exact` costs where it learns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixq_compile.benchmarking.packed_linear import PackedLinear
from mixq_compile.benchmarking.timing import Call, sample
from mixq_compile.errors import MixqError
from mixq_compile.ops.outlier_state import COUNT

PERIOD = 100
"""Calls after which the pattern of misses repeats: as many are timed, so that a rate in percent is exact."""


@dataclass(frozen=True)
class MissCost:
    """Calls of which a given share met a column that was not known."""

    percent: int
    calls: int
    misses: int
    """Columns learned in these calls and in those before that do not count, as the device says."""
    mean_us: float
    median_us: float
    p90_us: float
    overhead: float
    """Mean over that without misses, less 1."""


class MissPattern:
    """Sets a linear's state before each call: complete, or one column short as often as asked.

    It must have a state of its own that knows every planted column.
    """

    def __init__(self, linear: PackedLinear, columns: Sequence[int], percent: int) -> None:
        self.linear, self.percent = linear, percent
        self.planned, self.number, self.pending = 0, 0, False
        self.seen = torch.zeros((), dtype=torch.int32, device=linear.codes.device)
        linear.know(columns[:-1])
        self.short = self._copies()
        linear.know(columns)
        self.complete = self._copies()

    def _copies(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.linear.changing()]

    def begin(self) -> None:
        """Counts from here."""
        self.seen.zero_()
        self.planned, self.number, self.pending = 0, 0, False

    def prepare(self) -> None:
        """Notes what the last call learned, and sets the state for the next."""
        self.note()
        # Spread evenly: call n misses where n · percent / 100 passes a whole number.
        place = self.number % PERIOD
        misses = (place + 1) * self.percent // PERIOD > place * self.percent // PERIOD
        for buffer, saved in zip(
            self.linear.changing(), self.short if misses else self.complete, strict=True
        ):
            buffer.copy_(saved)
        self.started = (self.short if misses else self.complete)[_COUNTERS][COUNT]
        self.planned += misses
        self.number += 1
        self.pending = True

    def note(self) -> None:
        """Adds what the call since `prepare` learned, on the device."""
        if self.pending:
            self.seen += self.linear.state.counters[COUNT] - self.started
        self.pending = False


_COUNTERS = 3
"""Place of the counters among the buffers that change."""


def miss_costs(
    linear: PackedLinear, columns: Sequence[int], x: Tensor, percents: Sequence[int]
) -> tuple[MissCost, ...]:
    """Times the whole linear at each rate of misses, the rates taking turns.

    Raises MixqError where the device learned other numbers of columns than were planned.
    """
    patterns = {percent: MissPattern(linear.with_own_state(), columns, percent) for percent in percents}
    calls = {
        str(percent): Call(
            lambda pattern=pattern: pattern.linear.whole(x),  # type: ignore[misc]
            prepare=pattern.prepare,
            begin=pattern.begin,
        )
        for percent, pattern in patterns.items()
    }
    times, _ = sample(calls, x.device, PERIOD)
    means = {percent: statistics.fmean(times[str(percent)]) for percent in percents}
    base = means[min(percents)]
    found = []
    for percent, pattern in patterns.items():
        pattern.note()
        misses = int(pattern.seen)
        if misses != pattern.planned:
            raise MixqError(
                f"{pattern.planned} of the calls were to meet a new column and {misses} were learned: "
                "the miss path did not run as planned, so that its time means nothing."
            )
        values = times[str(percent)]
        found.append(
            MissCost(
                percent=percent,
                calls=len(values),
                misses=misses,
                mean_us=means[percent],
                median_us=statistics.median(values),
                p90_us=statistics.quantiles(values, n=10, method="inclusive")[-1],
                overhead=means[percent] / base - 1,
            )
        )
    return tuple(found)
