"""Which columns of a linear's input stay in 16 bit by its calibration."""

from __future__ import annotations

from typing import Any

from mixq_compile.scheme import QuantScheme


def calibrated_columns(
    stats: Any, fqn: str, scheme: QuantScheme, in_features: int
) -> tuple[list[int], list[float]] | None:
    """The outlier columns of a linear by its statistics, and their maxima; None where it has none.

    By its policy's `choose`: the columns above the threshold, at most as many as there are slots, or
    always as many, the largest first.
    """
    policy = scheme.outliers
    found = stats.find(fqn)
    if policy is None or scheme.activation is None or found is None:
        return None
    threshold = policy.threshold if policy.choose == "above" else None
    columns = stats.outlier_columns(fqn, threshold=threshold, count=policy.capacity_for(in_features))
    return columns, [float(found.absmax[column]) for column in columns]
