"""Which columns of a linear's input stay in 16 bit by its calibration."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from mixq_compile.scheme import QuantScheme
from mixq_compile.thresholds import Threshold, multiple_of


def calibrated_columns(
    stats: Any, fqn: str, scheme: QuantScheme, in_features: int, inverse: Tensor | None = None
) -> tuple[list[int], list[float]] | None:
    """The outlier columns of a linear by its statistics, and their maxima; None where it has none.

    By its policy's `choose`: the columns above the threshold, at most as many as there are slots, or
    always as many, the largest first. Where the threshold is a multiple of a row's mean magnitude, that is
    the mean over all rows here: statistics are not by row. `inverse` is what each channel is multiplied
    by since then, `[K]`.
    """
    policy = scheme.outliers
    found = stats.find(fqn)
    if policy is None or scheme.activation is None or found is None:
        return None
    if inverse is not None:
        # A channel's maximum is scaled as the channel is: the factors are positive.
        factors = inverse.float().cpu()
        found = dataclasses.replace(
            found, absmax=found.absmax * factors, mean_magnitude=found.mean_magnitude * factors
        )
        stats = dataclasses.replace(stats, linears={fqn: found}, never_run=())
    threshold = _magnitude(policy.threshold, found.mean_magnitude) if policy.choose == "above" else None
    columns = stats.outlier_columns(fqn, threshold=threshold, count=policy.capacity_for(in_features))
    return columns, [float(found.absmax[column]) for column in columns]


def _magnitude(threshold: Threshold, mean_magnitude: Tensor) -> float:
    """The magnitude that a threshold means for an input of these channel means `[K]`; infinite for zeros."""
    multiple = multiple_of(threshold)
    if multiple is None:
        return float(threshold)
    return multiple * float(mean_magnitude.double().mean()) or math.inf
