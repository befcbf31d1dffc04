"""What making the weight of a linear takes from calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mixq_compile.errors import StatisticsError
from mixq_compile.scheme import QuantScheme
from mixq_compile.weights.recipe import MAGNITUDES, InputStatistics, needs

LINEAR_IN_X = frozenset({MAGNITUDES})
"""Statistics that are multiplied where x is."""


def input_statistics(
    stats: Any, fqn: str, scheme: QuantScheme, inverse: Tensor | None = None, changed: str | None = None
) -> InputStatistics | None:
    """The statistics that a scheme's weights are made with; None where it needs none, or there are none.

    `inverse` is what each channel is multiplied by since calibration, `[K]`; `changed` says what else was
    done to the input. Raises StatisticsError where a kind that it needs was not collected, or is not known
    any more.
    """
    names = needs(scheme.recipe)
    found = stats.find(fqn) if stats is not None and names else None
    if found is None:
        return None
    if changed is not None or (inverse is not None and set(names) - LINEAR_IN_X):
        raise StatisticsError(
            f"the weights of scheme {scheme.name!r} are made with {', '.join(names)} of the input of "
            f"{fqn!r}, which was {changed or 'multiplied by factors'} after calibration: leave that pass out."
        )
    factors = 1.0 if inverse is None else inverse.float().cpu()
    tensors = {name: getattr(found, name) * factors for name in names}
    return InputStatistics(_digest(tensors), tensors)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The hash of one linear's statistics: of all linears' it would be read anew for each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
