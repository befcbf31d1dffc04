"""Running statistics of one input, in each kind asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mixq_compile.calibration.collected import FURTHER
from mixq_compile.calibration.collected.channels import ChannelAccumulator
from mixq_compile.calibration.linear_statistics import LinearStatistics


class FurtherAccumulator(Protocol):
    """What the module of a kind offers as its `ACCUMULATOR`: made of K and a device."""

    def add(self, rows: Tensor) -> None:
        """Takes in finite rows `[M, K]` of any floating dtype."""

    def value(self) -> Tensor:
        """The kind's tensor, on the CPU."""


class InputAccumulator:
    """Takes in rows `[M, K]` and hands those that are finite to the accumulator of each kind.

    Rows that hold a NaN or an infinity are counted and otherwise ignored, so that one overflow does
    not spoil the statistics of a whole run.
    """

    def __init__(
        self, in_features: int, kinds: Sequence[str], thresholds: Sequence[float], device: torch.device
    ) -> None:
        self.rows = 0
        self.nonfinite_rows = 0
        self.channels = ChannelAccumulator(in_features, device, thresholds)
        self.further: dict[str, FurtherAccumulator] = {
            kind: FURTHER[kind].ACCUMULATOR(in_features, device) for kind in kinds if kind in FURTHER
        }

    def add(self, rows: Tensor) -> None:
        """Takes in rows `[M, K]` of any floating dtype."""
        # A row's extremes are NaN or infinite exactly where one of its elements is, and reading
        # 2 M of them costs a fraction of testing M x K elements.
        least, largest = rows.aminmax(dim=1)
        finite = least.isfinite() & largest.isfinite()
        finite_rows = int(finite.sum())
        self.nonfinite_rows += rows.shape[0] - finite_rows
        if finite_rows == 0:
            return
        if finite_rows < rows.shape[0]:
            rows = rows[finite]
        self.rows += finite_rows
        self.channels.add(rows)
        for accumulator in self.further.values():
            accumulator.add(rows)

    def statistics(self, names: Sequence[str]) -> dict[str, LinearStatistics]:
        """What was seen so far, under each of these names; large tensors are shared among them."""
        further = {kind: accumulator.value() for kind, accumulator in self.further.items()}
        return {
            name: LinearStatistics(
                fqn=name,
                rows=self.rows,
                nonfinite_rows=self.nonfinite_rows,
                further=further,
                **self.channels.value(),
            )
            for name in names
        }
