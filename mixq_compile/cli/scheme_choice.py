"""One `--scheme` of `mixq eval`: a scheme's name, with options of its own in braces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixq_compile.errors import OptionError, unknown_name
from mixq_compile.scheme import OutlierPolicy
from mixq_compile.schemes.registry import get_scheme

NONE = "none"
"""Stands for full precision, which is always evaluated."""
OPTION_TYPES = {"threshold": float | str, "capacity": int, "miss": str, "kernel": str}


@dataclass(frozen=True)
class SchemeChoice:
    """A scheme and the options to run it with."""

    label: str
    """What the user wrote."""
    options: Mapping[str, Any]
    """Fields of MixqOptions, `scheme` among them."""

    @property
    def wants_statistics(self) -> bool:
        """True where it needs them, or always chooses as many columns, which only calibration can."""
        policy = get_scheme(self.options["scheme"]).outliers
        chooses = self.takes_statistics and policy is not None and policy.choose == "largest"
        return chooses or self.needs_statistics

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of statistics that it takes where it is calibrated."""
        from mixq_compile.calibration.collected import KINDS
        from mixq_compile.weights.recipe import needs

        wanted = needs(get_scheme(self.options["scheme"]).recipe)
        return tuple(kind for kind in KINDS if kind == "channels" or kind in wanted)

    @property
    def needs_statistics(self) -> bool:
        """True where its weights cannot be made without."""
        from mixq_compile.weights.recipe import needs

        return bool(needs(get_scheme(self.options["scheme"]).recipe))

    @property
    def takes_statistics(self) -> bool:
        """False where there are no outlier columns to choose, and the weights need none."""
        finite = self.options.get("threshold") != math.inf
        return self.needs_statistics or (finite and get_scheme(self.options["scheme"]).outliers is not None)


def parse_choice(text: str, common: Mapping[str, Any]) -> SchemeChoice | None:
    """Reads `w4a4o16` or `w4a4o16{threshold=inf capacity=32}`; None for `none`.

    `common` are options of every scheme, which those in braces replace. Raises OptionError.
    """
    from mixq_compile.pipeline.options import OptionType
    from mixq_compile.pipeline.text import parse_text

    if text == NONE:
        return None
    parsed = parse_text(text)
    if len(parsed) != 1:
        raise OptionError(f"--scheme takes one scheme, not {text!r}: repeat the option for another.")
    (written,) = parsed
    get_scheme(written.name)
    options: dict[str, Any] = {key: value for key, value in common.items() if value is not None}
    for option in written.options:
        if option.name not in OPTION_TYPES:
            raise unknown_name(f"option of --scheme {written.name}", option.name, OPTION_TYPES)
        try:
            options[option.name] = OptionType.of(OPTION_TYPES[option.name]).parse(list(option.atoms))
        except ValueError as error:
            wanted = OptionType.of(OPTION_TYPES[option.name])
            given = ",".join(atom.text for atom in option.atoms)
            raise OptionError(f"{written.name}{{{option.name}=}} takes {wanted}, not {given!r}.") from error
    OutlierPolicy(**{key: value for key, value in options.items() if key != "kernel"})
    return SchemeChoice(text, {**options, "scheme": written.name})
