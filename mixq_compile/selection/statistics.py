"""What making the weight of a linear takes from calibration."""

from __future__ import annotations

from typing import Any

from mixq_compile.scheme import QuantScheme
from mixq_compile.weights.recipe import InputStatistics, needs


def input_statistics(stats: Any, fqn: str, scheme: QuantScheme) -> InputStatistics | None:
    """The statistics that a scheme's weights are made with; None where it needs none, or there are none.

    Raises StatisticsError where a kind that it needs was not collected.
    """
    names = needs(scheme.recipe)
    found = stats.find(fqn) if stats is not None and names else None
    if found is None:
        return None
    return InputStatistics(stats.sha256(), {name: getattr(found, name) for name in names})
