"""`channels`: magnitudes and squares of a linear's input, per input channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FIELDS = {
    "absmax": torch.float32,
    "mean_magnitude": torch.float32,
    "mean_square": torch.float32,
    "rows_above": torch.int64,
}
"""The tensors of this kind, in the order in which they are hashed."""


class ChannelAccumulator:
    """Adds up magnitudes and squares of rows `[M, K]`, column by column, in float64 on their device."""

    def __init__(self, in_features: int, device: torch.device, thresholds: Sequence[float]) -> None:
        self.thresholds = tuple(thresholds)
        self.rows = 0
        self.absmax = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.magnitude_sum = torch.zeros_like(self.absmax)
        self.square_sum = torch.zeros_like(self.absmax)
        self.rows_above = torch.zeros(len(self.thresholds), in_features, dtype=torch.int64, device=device)

    def add(self, rows: Tensor) -> None:
        """Takes in finite rows `[M, K]` of any floating dtype, M above 0."""
        self.rows += rows.shape[0]
        magnitude = rows.abs()
        if magnitude.dtype != torch.float64:
            magnitude = magnitude.float()
        column_max = magnitude.amax(dim=0)
        self.magnitude_sum += magnitude.sum(dim=0)
        for place, threshold in enumerate(self.thresholds):
            columns = (column_max > threshold).nonzero()[:, 0]
            self.rows_above[place, columns] += (magnitude[:, columns] > threshold).sum(dim=0)
        self.absmax = torch.maximum(self.absmax, column_max)
        self.square_sum += magnitude.square_().sum(dim=0)

    def value(self) -> dict[str, Tensor]:
        """The tensors of `FIELDS`, on the CPU; the means are over the rows taken in so far."""
        count = max(self.rows, 1)
        return {
            "absmax": self.absmax.float().cpu(),
            "mean_magnitude": (self.magnitude_sum / count).float().cpu(),
            "mean_square": (self.square_sum / count).float().cpu(),
            "rows_above": self.rows_above.cpu(),
        }
