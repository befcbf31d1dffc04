"""`sample`: some of the rows of a linear's input, for searches that run candidates on them (AWQ)."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

ROWS = 512
"""Most rows of a sample."""
SEED = 0


class SampleAccumulator:
    """A reservoir of at most `ROWS` rows `[K]`: each row seen so far is in it with equal probability.

    Which rows stay depends on the seed and on their places among all rows alone: not on how batches
    split them, nor on the device. Linears that see equally many rows keep those of the same places.
    """

    def __init__(self, in_features: int, device: torch.device, size: int = ROWS, seed: int = SEED) -> None:
        self.rows = torch.zeros(size, in_features, dtype=torch.float32, device=device)
        self.places: list[int] = []
        self.seen = 0
        self._random = random.Random(seed)
        self._weight = 1.0
        self._next = size - 1
        self._skip()

    def add(self, rows: Tensor) -> None:
        """Takes in finite rows `[M, K]` of any floating dtype."""
        size, end = self.rows.shape[0], self.seen + rows.shape[0]
        taken: dict[int, int] = {}
        for place in range(self.seen, min(size, end)):
            taken[place] = place
            self.places.append(place)
        while self._next < end:
            slot = self._random.randrange(size)
            taken[slot] = self.places[slot] = self._next
            self._skip()
        if taken:
            slots = torch.tensor(list(taken), dtype=torch.int64, device=self.rows.device)
            places = torch.tensor(list(taken.values()), dtype=torch.int64, device=rows.device)
            self.rows[slots] = rows[places - self.seen].to(self.rows)
        self.seen = end

    def value(self) -> Tensor:
        """The sample `[S, K]` in fp32 on the CPU, in the order in which the rows came."""
        order = sorted(range(len(self.places)), key=self.places.__getitem__)
        return self.rows.cpu()[order]

    def _skip(self) -> None:
        """Moves on to the next row that enters the full reservoir (Li's algorithm L)."""
        self._weight *= math.exp(math.log(1 - self._random.random()) / self.rows.shape[0])
        step = math.log(1 - self._random.random()) / math.log1p(-self._weight) if self._weight < 1 else 0
        self._next += math.floor(step) + 1


ACCUMULATOR = SampleAccumulator


def working_bytes(in_features: int) -> int:
    """Bytes on the linear's device while it is collected."""
    return ROWS * in_features * 4


def value_bytes(in_features: int) -> int:
    """Bytes of the value, on the CPU."""
    return ROWS * in_features * 4


def fits(value: Tensor, in_features: int) -> bool:
    """Whether a tensor can be the value of a linear with K input channels."""
    return value.dtype == torch.float32 and value.ndim == 2 and value.shape[1] == in_features
