"""What making the weight of a linear takes from calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mixq_compile.errors import StatisticsError
from mixq_compile.scheme import QuantScheme
from mixq_compile.selection.columns import calibrated_columns
from mixq_compile.weights.recipe import KEPT, MAGNITUDES, InputStatistics, keeps_columns, needs

IN_CHANNELS = frozenset({MAGNITUDES})
"""Statistics of the kind `channels`, which is always collected."""
LINEAR_IN_X = frozenset({MAGNITUDES})
"""Statistics that are multiplied where x is."""


def check_given(stats: Any, schemes: Iterable[QuantScheme]) -> None:
    """Raises StatisticsError, before any work, where schemes need statistics that are not at hand.

    `stats` are CalibrationStats or None.
    """
    for scheme in schemes:
        wanted = needs(scheme.recipe)
        kinds = tuple(name for name in wanted if name not in IN_CHANNELS)
        how = f"calibrate(model, batches, kinds={kinds})" if kinds else "calibrate(model, batches)"
        made = f"scheme {scheme.name!r} makes its weights with the {' and '.join(wanted)} of linears' inputs"
        if wanted and stats is None:
            raise StatisticsError(f"{made}, and there are no stats: pass stats=mixq_compile.{how}.")
        if any(kind not in stats.kinds for kind in kinds):
            raise StatisticsError(
                f"{made}, and these stats hold {', '.join(stats.kinds)}: calibrate again, with {how}."
            )


def never_ran(stats: Any, fqn: str, scheme: QuantScheme) -> str | None:
    """Why calibration cannot make the weight of this linear; None where it can, or need not."""
    names = needs(scheme.recipe)
    if not names or stats is None or stats.find(fqn) is not None:
        return None
    return f"it never ran during calibration, and {scheme.name} needs {' and '.join(names)} of its input"


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
    if scheme.outliers is not None and keeps_columns(scheme.recipe, scheme.outliers.miss):
        chosen = calibrated_columns(stats, fqn, scheme, found.in_features)
        tensors[KEPT] = torch.tensor(chosen[0] if chosen else [], dtype=torch.int64, device="cpu")
    return InputStatistics(_digest(tensors), tensors)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The hash of one linear's statistics: of all linears' it would be read anew for each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
