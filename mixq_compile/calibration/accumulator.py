"""Running statistics of one linear's input, per input channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixq_compile.calibration.statistics import LinearStatistics


class ChannelAccumulator:
    """Adds up magnitudes and squares of activations `[..., K]`, column by column.

    The sums live in float64 on the activation's device; rows that hold a NaN or an infinity are
    counted and otherwise ignored, so that one overflow does not spoil the statistics of a whole run.
    """

    def __init__(self, in_features: int, thresholds: Sequence[float], device: torch.device) -> None:
        self.thresholds = tuple(thresholds)
        self.rows = 0
        self.nonfinite_rows = 0
        self.absmax = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.magnitude_sum = torch.zeros_like(self.absmax)
        self.square_sum = torch.zeros_like(self.absmax)
        self.rows_above = torch.zeros(len(self.thresholds), in_features, dtype=torch.int64, device=device)

    def add(self, activation: Tensor) -> None:
        """Takes in one activation `[..., K]` of any floating dtype."""
        rows = activation.detach().reshape(-1, activation.shape[-1])
        if rows.shape[0] == 0:
            return
        magnitude = rows.abs()
        if magnitude.dtype != torch.float64:
            magnitude = magnitude.float()
        # A row's maximum is NaN or infinite exactly where one of its elements is, and reading
        # the M maxima costs a twentieth of testing M x K elements.
        finite = magnitude.amax(dim=1).isfinite()
        finite_rows = int(finite.sum())
        self.nonfinite_rows += magnitude.shape[0] - finite_rows
        if finite_rows == 0:
            return
        if finite_rows < magnitude.shape[0]:
            magnitude = magnitude[finite]
        self.rows += finite_rows
        self._add_finite(magnitude)

    def _add_finite(self, magnitude: Tensor) -> None:
        column_max = magnitude.amax(dim=0)
        self.magnitude_sum += magnitude.sum(dim=0)
        for place, threshold in enumerate(self.thresholds):
            columns = (column_max > threshold).nonzero()[:, 0]
            self.rows_above[place, columns] += (magnitude[:, columns] > threshold).sum(dim=0)
        self.absmax = torch.maximum(self.absmax, column_max)
        self.square_sum += magnitude.square_().sum(dim=0)

    def statistics(self, fqn: str) -> LinearStatistics:
        """What was seen so far, under this name; the means are over the finite rows."""
        count = max(self.rows, 1)
        return LinearStatistics(
            fqn=fqn,
            absmax=self.absmax.float().cpu(),
            mean_magnitude=(self.magnitude_sum / count).float().cpu(),
            mean_square=(self.square_sum / count).float().cpu(),
            rows=self.rows,
            nonfinite_rows=self.nonfinite_rows,
            rows_above=self.rows_above.cpu(),
        )
