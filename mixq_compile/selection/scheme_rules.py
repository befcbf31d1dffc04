"""The scheme of a linear: by its name, its role, and the options for outliers."""

from __future__ import annotations

from dataclasses import dataclass

from mixq_compile.errors import OptionError
from mixq_compile.ir.name_patterns import name_matches
from mixq_compile.scheme import QuantScheme
from mixq_compile.schemes.registry import get_scheme
from mixq_compile.thresholds import Threshold
from mixq_compile.weights.recipe import keeps_columns, outliers_from_codes


@dataclass(frozen=True)
class SchemeRules:
    """What decides about the scheme of each linear of a model."""

    default: str
    """Scheme of every linear that nothing else decides."""
    layers: tuple[tuple[str, str], ...] = ()
    """Schemes of single linears: (pattern, scheme) pairs, of which the first that fits decides."""
    threshold: Threshold | None = None
    """Replaces that of each scheme's outlier policy; None: the scheme's. So do the following."""
    capacity: int | None = None
    miss: str | None = None

    def scheme_for(self, fqn: str, role: str) -> QuantScheme:
        """The scheme of a linear of this name and role. Raises OptionError for an unknown scheme."""
        named = next((scheme for pattern, scheme in self.layers if name_matches(fqn, pattern)), self.default)
        found = get_scheme(named)
        instead = dict(found.instead).get(role)
        if instead is not None:
            found = get_scheme(instead)
        changes = {"threshold": self.threshold, "capacity": self.capacity, "miss": self.miss}
        chosen = found.with_outliers(**{name: value for name, value in changes.items() if value is not None})
        _check_fixed(chosen)
        return chosen


def _check_fixed(scheme: QuantScheme) -> None:
    """Raises OptionError where columns found while running could only be taken from joint 4-bit codes."""
    policy = scheme.outliers
    if policy is None or scheme.weight.bits > 4 or not outliers_from_codes(scheme.recipe):
        return
    if not keeps_columns(scheme.recipe, policy.miss):
        raise OptionError(
            f"scheme {scheme.name!r} keeps the columns that calibration chose, and its 4-bit codes are too "
            f"coarse for others: its miss policy must be 'static' or 'frozen', not {policy.miss!r}."
        )
