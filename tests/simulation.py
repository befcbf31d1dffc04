"""The semantics of the quantized linear, simulated in NumPy and float64: what every result is compared to.

Written from docs/semantics.md alone; shares no code with the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EPSILON = np.float32(2.0**-96)
TEACHING_LIMIT = np.float32(2.0**23)
Matrix = NDArray[np.float64]


def as_matrix(x: Tensor) -> Matrix:
    """The values of a tensor `[..., K]` as float64 `[M, K]`."""
    return np.asarray(x.detach().double().reshape(-1, x.shape[-1]).numpy())


@dataclass
class SimulatedCall:
    """What one call quantizes with."""

    columns: list[int | None]
    """The outlier column of each slot in use."""
    row_maximum: Matrix
    """[M]: the largest magnitude outside the outlier columns; NaN in rows that are not finite."""


@dataclass
class SimulatedState:
    """Outlier columns and their running maxima, by slot."""

    in_features: int
    capacity: int
    threshold: float | str
    slots: list[int | None] = field(default_factory=list)
    maxima: dict[int, float] = field(default_factory=dict)
    overflow: int = 0
    frozen: bool = False

    def __post_init__(self) -> None:
        self.relative = isinstance(self.threshold, str)
        self.limit = float(np.float32(str(self.threshold).removesuffix("x")))
        self.preload(sorted(self.maxima))

    def preload(self, columns: list[int]) -> None:
        self.slots = [*columns]
        self.maxima = {column: self.maxima.get(column, self.limit) for column in columns}

    @property
    def columns(self) -> list[int]:
        return [column for column in self.slots if column is not None]

    def row_maximum(self, values: Matrix) -> Matrix:
        inner = np.abs(values)
        inner[:, self.columns] = 0.0
        maxima = inner.max(axis=1, initial=0.0)
        maxima[~np.isfinite(values).all(axis=1)] = np.nan
        return maxima

    def call(self, x: Tensor, miss: str, bits: int = 8) -> SimulatedCall:
        """Quantizes one input under a miss policy and learns from it."""
        values = as_matrix(x)
        with np.errstate(invalid="ignore"):
            teaches = scale_of(self.row_maximum(values), bits) < TEACHING_LIMIT
        if miss == "per_call":
            teaches = np.isfinite(values).all(axis=1)
        compared = multiples_of(values) if self.relative else np.abs(values)
        column_max = compared[teaches].max(axis=0, initial=0.0)
        learns = miss != "static" and not self.frozen
        if learns and miss == "per_call":
            self._replace(column_max)
        compared[:, self.columns] = 0.0
        exceeded = bool((compared[teaches] > self.limit).any())
        grows = learns and exceeded and miss != "per_call"
        if grows and miss != "lazy":
            self._grow(column_max, may_evict=True)
        result = SimulatedCall([*self.slots], self.row_maximum(values))
        if grows and miss == "lazy":
            self._grow(column_max, may_evict=False)
        return result

    def _replace(self, column_max: Matrix) -> None:
        reached = [int(column) for column in np.flatnonzero(column_max >= self.limit)]
        kept = sorted(reached, key=lambda column: (-column_max[column], column))[: self.capacity]
        self.slots = [*sorted(kept)]
        self.maxima = {column: float(column_max[column]) for column in kept}
        self.overflow += len(reached) - len(kept)

    def _grow(self, column_max: Matrix, may_evict: bool) -> None:
        for column in self.columns:
            self.maxima[column] = max(self.maxima[column], float(column_max[column]))
        new = [
            int(column)
            for column in np.flatnonzero(column_max > self.limit)
            if int(column) not in self.columns
        ]
        size = {**self.maxima, **{column: float(column_max[column]) for column in new}}
        pool = self.columns + new if may_evict else new
        room = self.capacity if may_evict else self.capacity - len(self.columns)
        ranked = sorted(pool, key=lambda column: (-size[column], column))
        kept, left_out = set(ranked[:room]), ranked[room:]
        if left_out:
            self.overflow += len(left_out)
            self.limit = max(self.limit, *(size[column] for column in left_out))
        if may_evict:
            self.slots = [column if column in kept else None for column in self.slots]
        for column in sorted(column for column in new if column in kept):
            if None in self.slots:
                self.slots[self.slots.index(None)] = column
            else:
                self.slots.append(column)
        self.maxima = {column: size[column] for column in self.columns}


def multiples_of(values: Matrix) -> Matrix:
    """Magnitudes `[M, K]` as multiples of the mean of their row, in fp32; 0 in rows that have none.

    The mean is that of magnitudes in whole units, of which the largest has 2^13 or more.
    """
    found = np.zeros_like(values)
    for row, magnitudes in enumerate(np.abs(values)):
        largest = magnitudes.max(initial=0.0)
        if 2.0**-96 <= largest < 2.0**112:
            unit = 2.0 ** (np.frexp(largest)[1] - 1 - 13)
            total = np.float32(np.floor(magnitudes / unit).sum())
            inverse = float(np.float32(len(magnitudes)) / total) / unit
            found[row] = (magnitudes * inverse).astype(np.float32)
    return found


def scale_of(row_maximum: Matrix, bits: int) -> NDArray[np.float32]:
    """fp32 row scales of these row maxima: one division, rounded once."""
    return np.maximum(row_maximum.astype(np.float32), EPSILON) / np.float32(2 ** (bits - 1) - 1)


def codes_of(x: Tensor, call: SimulatedCall, bits: int) -> NDArray[np.int8]:
    """int8 codes `[M, K]` of an input."""
    largest = np.float32(2 ** (bits - 1) - 1)
    values = as_matrix(x).astype(np.float32)
    maxima = call.row_maximum.astype(np.float32)
    alive = np.isfinite(call.row_maximum) & (maxima >= EPSILON)
    values[:, [column for column in call.columns if column is not None]] = 0.0
    values[~alive] = 0.0
    inverse = largest / np.where(alive, maxima, np.float32(1))
    return np.clip(np.rint(values * inverse[:, None]), -largest, largest).astype(np.int8)


def outliers_of(x: Tensor, call: SimulatedCall, capacity: int) -> Matrix:
    """The outlier columns `[M, C]` of an input by slot; zero in slots that are not used."""
    values = as_matrix(x)
    found = np.zeros((values.shape[0], capacity))
    for slot, column in enumerate(call.columns):
        if column is not None:
            found[:, slot] = values[:, column]
    return found


def linear(
    x: Tensor,
    call: SimulatedCall,
    bits: int,
    weight: Tensor,
    outlier_weight_source: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The quantized linear in float64, `[..., N]`.

    `weight` is what the codes stand for, `outlier_weight_source` where outlier columns are taken from.
    """
    scale = scale_of(call.row_maximum, bits).astype(np.float64)
    product = codes_of(x, call, bits).astype(np.float64) @ as_matrix(weight).T * scale[:, None]
    columns = [column for column in call.columns if column is not None]
    with np.errstate(invalid="ignore"):
        product = product + as_matrix(x)[:, columns] @ as_matrix(outlier_weight_source)[:, columns].T
    if bias is not None:
        product = product + bias.double().numpy()
    return torch.from_numpy(product).reshape(*x.shape[:-1], weight.shape[0])
