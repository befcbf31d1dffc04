"""Which columns of a linear's input stay in 16 bit by its calibration."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from mixq_compile.scheme import QuantScheme


def calibrated_columns(
    stats: Any, fqn: str, scheme: QuantScheme, in_features: int, inverse: Tensor | None = None
) -> tuple[list[int], list[float]] | None:
    """The outlier columns of a linear by its statistics, and their maxima; None where it has none.

    By its policy's `choose`: the columns above the threshold, at most as many as there are slots, or
    always as many, the largest first. `inverse` is what each channel is multiplied by since then, `[K]`.
    """
    policy = scheme.outliers
    found = stats.find(fqn)
    if policy is None or scheme.activation is None or found is None:
        return None
    if inverse is not None:
        # A channel's maximum is scaled as the channel is: the factors are positive.
        found = dataclasses.replace(found, absmax=found.absmax * inverse.float().cpu())
        stats = dataclasses.replace(stats, linears={fqn: found}, never_run=())
    threshold = policy.threshold if policy.choose == "above" else None
    columns = stats.outlier_columns(fqn, threshold=threshold, count=policy.capacity_for(in_features))
    return columns, [float(found.absmax[column]) for column in columns]
