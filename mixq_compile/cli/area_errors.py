"""What `mixq area` measures on a model that has weights: errors of linears, and outlier columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mixq_compile.area.linear_areas import LinearSize
from mixq_compile.benchmarking.layer_errors import layer_errors, simulated_errors
from mixq_compile.benchmarking.simulated_schemes import SIMULATED
from mixq_compile.cli.output import step
from mixq_compile.errors import OptionError
from mixq_compile.inspection.layers import calibrated_columns
from mixq_compile.schemes.registry import get_scheme
from mixq_compile.thresholds import PAPER_THRESHOLD

if TYPE_CHECKING:
    from mixq_compile.cli.capturing import Captured
    from mixq_compile.pipeline.history import History

OWN_SCHEMES = ("w8a8", "w8a8o16", "w4a8o16", "w4a4o16")
"""Schemes that this package runs, so that their error is measured."""
FINDS_COLUMNS = "w8a8o16"
"""The scheme that is run to count outlier columns."""


@dataclass(frozen=True)
class Measured:
    """What runs of a model found."""

    sqnr_db: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By scheme and layer."""
    columns: Mapping[str, int] = field(default_factory=dict)
    """Outlier columns by layer."""


def measured_errors(
    captured: Captured,
    history: History,
    schemes: Sequence[str],
    sizes: Mapping[str, LinearSize],
    threshold: float | str | None,
    *,
    errors: bool,
) -> Measured:
    """Runs the model once for each of mixq's schemes, and once for all others.

    Without `errors` the model is run for the outlier columns alone.
    """
    model = captured.model
    assert model is not None
    columns = calibrated_columns(history)
    others = [name for name in schemes if errors and name in SIMULATED]
    if others and isinstance(threshold, str):
        raise OptionError(
            f"--threshold {threshold} is a multiple of a row's mean magnitude, and {', '.join(others)} know "
            "magnitudes only: give one, such as 6.0, or leave those schemes out of --scheme."
        )
    found: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    own = [FINDS_COLUMNS, *(name for name in OWN_SCHEMES if errors and name in schemes)]
    for name in dict.fromkeys(own):
        scheme = get_scheme(name)
        taken = scheme if threshold is None else scheme.with_outliers(threshold=threshold)
        with step(f"measuring errors of {name}"):
            layers = layer_errors(model, dict.fromkeys(sizes, taken), captured.args, captured.kwargs, columns)
        if name == FINDS_COLUMNS:
            counts = {fqn: layer.found_columns for fqn, layer in layers.items()}
        if errors and name in schemes:
            found[name] = {fqn: layer.sqnr_db for fqn, layer in layers.items()}
    if others:
        with step("simulating the number formats of other schemes"):
            limit = PAPER_THRESHOLD if threshold is None else float(threshold)
            found |= simulated_errors(model, sizes, others, captured.args, captured.kwargs, limit)
    return Measured(found, counts)
