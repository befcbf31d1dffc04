"""The device buffers that remember which columns of one activation are outliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixq_compile.errors import OptionError
from mixq_compile.thresholds import Threshold, multiple_of, state_number

COUNT, OVERFLOW, FLAG, FROZEN = range(4)
"""Places in `OutlierState.counters`."""

HELD = 2
"""Added to `counters[FROZEN]` while `hold_states` lasts: what is not 0 there learns nothing."""

_HELD_AT: set[tuple[torch.device, int]] = set()
"""Device and address of the counters that are held now; those of a copy lie elsewhere."""

STATE_FIELDS = ("index", "column_slot", "column_max", "counters", "effective_threshold")
"""The buffers, in the order in which operators take them."""


RELATIVE_BITS = 13
"""A row's mean magnitude is taken over its magnitudes in units of 2^-13 of the largest one's power of two,
rounded towards 0: sums of whole numbers, which do not depend on their order. See docs/semantics.md."""
SMALLEST_RELATIVE, LARGEST_RELATIVE = 2.0**-96, 2.0**112
"""A row teaches by a multiple of its mean where its largest magnitude is in between: else a unit or the
inverse of a mean may be no normal number, and kernels would differ."""
MOST_RELATIVE_COLUMNS = (1 << 31 - RELATIVE_BITS - 1) - 1
"""A sum of more such units may not fit 32 bits."""

TEACHING_LIMIT = 2.0**23
"""A row teaches columns only where its fp32 scale is below this: at 8 bit, magnitudes of about 1e9 outside
the outlier columns. Larger ones are uninitialised or made-up values, which would keep every slot for good.
The scale of a row that is not finite is NaN, and so is not below it either."""


@dataclass
class OutlierState:
    """State of one quantization point: one activation, shared by all linears that read it.

    Fixed shapes and addresses, changed in place on the device, so that captured graphs stay valid.
    """

    index: Tensor
    """[C] int32: the column in each slot; only the first `count` slots hold one."""
    column_slot: Tensor
    """[K] int32: the slot of each column, -1 where it is no outlier."""
    column_max: Tensor
    """[C] fp32: largest magnitude seen in a slot's column, in calls that found a new column; where the
    threshold is a multiple, the largest multiple of a row's mean."""
    counters: Tensor
    """[4] int32: count, overflow (columns turned away), flag (a row exceeded), frozen."""
    effective_threshold: Tensor
    """[1] fp32: the threshold, or the largest column maximum that found no slot; minus the multiple where it
    is one."""
    threshold: Threshold
    calibrated: tuple[tuple[int, float], ...] = ()
    """Columns, with their maxima, that a reset keeps."""

    @classmethod
    def create(
        cls, in_features: int, capacity: int, threshold: Threshold, device: torch.device | str
    ) -> OutlierState:
        """An empty state for K = `in_features` columns and C = `capacity` slots.

        Raises OptionError where the threshold is a multiple and the columns are too many for one.
        """
        if multiple_of(threshold) is not None and in_features > MOST_RELATIVE_COLUMNS:
            raise OptionError(
                f"threshold {threshold!r} is a multiple of a row's mean, which is defined for up to "
                f"{MOST_RELATIVE_COLUMNS} input channels, not {in_features}: give a magnitude such as 6.0."
            )
        state = cls(
            index=torch.zeros(capacity, dtype=torch.int32, device=device),
            column_slot=torch.full((in_features,), -1, dtype=torch.int32, device=device),
            column_max=torch.zeros(capacity, dtype=torch.float32, device=device),
            counters=torch.zeros(4, dtype=torch.int32, device=device),
            effective_threshold=torch.full((1,), state_number(threshold), dtype=torch.float32, device=device),
            threshold=threshold,
        )
        return state

    @property
    def capacity(self) -> int:
        """C, the number of slots."""
        return self.index.shape[0]

    def buffers(self) -> tuple[Tensor, ...]:
        """The buffers in the order in which operators take them."""
        return tuple(getattr(self, name) for name in STATE_FIELDS)

    def named_buffers(self) -> dict[str, Tensor]:
        """The buffers by the names that operators give them."""
        return {name: getattr(self, name) for name in STATE_FIELDS}

    def reset(self) -> None:
        """Forgets every column found online, in place; calibrated ones stay, and so does freezing by them."""
        kept = self.counters[FROZEN] & (HELD | 1 if self.calibrated else HELD)
        self._clear()
        self._write(self.calibrated)
        self.counters[FROZEN] = kept

    def renew(self, entries: Sequence[tuple[int, float]]) -> None:
        """Writes everything anew: these columns with their maxima, slot by slot, and nothing turned away."""
        self._clear()
        self._write(entries)

    def _clear(self) -> None:
        self.index.zero_()
        self.column_slot.fill_(-1)
        self.column_max.zero_()
        self.counters.zero_()
        self.effective_threshold.fill_(state_number(self.threshold))

    def freeze(self) -> None:
        """Keeps the columns known now: later calls enlarge the row scale instead of adding one."""
        self.counters[FROZEN] |= 1

    @property
    def held(self) -> bool:
        """True between `hold` and `let_go`; waits for the device."""
        return not self.counters.is_meta and bool(self.counters[FROZEN] & HELD)

    def hold(self) -> bool:
        """Learns nothing until `let_go`; False where it was held already."""
        if self.held:
            return False
        _HELD_AT.add(self._place)
        self.counters[FROZEN] |= HELD
        return True

    def let_go(self) -> None:
        """Ends `hold`: frozen is what was frozen before, or meanwhile."""
        _HELD_AT.discard(self._place)
        self.counters[FROZEN] &= ~HELD

    def let_go_if_copied(self) -> None:
        """Ends the hold that a copy of a held state has brought along; nobody else would end it."""
        if self.held and self._place not in _HELD_AT:
            self.let_go()

    @property
    def _place(self) -> tuple[torch.device, int]:
        return self.counters.device, self.counters.data_ptr()

    def preload(self, columns: Sequence[int], column_max: Sequence[float] | None = None) -> None:
        """Starts with these columns (calibrated), ascending, in place of those known so far.

        Raises OptionError where there are more of them than slots, or one is out of range.
        """
        if len(columns) > self.capacity:
            raise OptionError(
                f"{len(columns)} outlier columns do not fit a capacity of {self.capacity}: "
                "raise capacity (a multiple of 16) or the threshold."
            )
        in_features = self.column_slot.shape[0]
        if any(not 0 <= column < in_features for column in columns):
            raise OptionError(f"an outlier column lies outside 0…{in_features - 1}.")
        if column_max is None or multiple_of(self.threshold) is not None:
            # Magnitudes of calibration are no multiples of rows' means: growing finds those.
            column_max = [abs(state_number(self.threshold))] * len(columns)
        maxima = list(column_max)
        self.calibrated = tuple(sorted(zip(columns, maxima, strict=True)))
        self._clear()
        self._write(self.calibrated)

    def _write(self, entries: Sequence[tuple[int, float]]) -> None:
        device = self.index.device
        chosen = torch.tensor([column for column, _ in entries], dtype=torch.int32, device=device)
        self.index[: len(entries)] = chosen
        maxima = torch.tensor([value for _, value in entries], dtype=torch.float32, device=device)
        self.column_max[: len(entries)] = maxima
        self.column_slot[chosen.long()] = torch.arange(len(entries), dtype=torch.int32, device=device)
        self.counters[COUNT] = len(entries)

    def columns(self) -> list[int]:
        """The outlier columns known now, by slot; waits for the device."""
        return [int(column) for column in self.index[: int(self.counters[COUNT])].tolist()]

    def overflow(self) -> int:
        """How often a column found no slot; waits for the device."""
        return int(self.counters[OVERFLOW])
