"""Checks of what callers give: shapes, counts and widths, each refused with its name and value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from mixq_compile.errors import OptionError

NARROWEST, WIDEST = 2, 16


def whole_number(name: str, value: Any, *, least: int, most: int | None = None, why: str = "") -> int:
    """The value as an int. Raises OptionError for a boolean, a fraction, or one outside `least`…`most`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise OptionError(f"{name} must be a whole number, not {value!r}.") from None
    if found < least or (most is not None and found > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise OptionError(f"{name} must be {bounds}, not {found}{why and f': {why}'}.")
    return found


def bits(name: str, value: Any) -> int:
    """A width of an operand, 2 to 16 bits."""
    return whole_number(name, value, least=NARROWEST, most=WIDEST)


def matrix(name: str, shape: Any) -> tuple[int, int]:
    """The two sizes of a matrix, each at least 1."""
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise OptionError(f"{name} must be a pair of sizes, not {shape!r}.")
    if len(shape) != 2:
        raise OptionError(f"{name} must have 2 dimensions, not {len(shape)}: {tuple(shape)!r}.")
    first, second = (whole_number(f"{name}[{place}]", size, least=1) for place, size in enumerate(shape))
    return first, second


def equal(first_name: str, first: int, second_name: str, second: int) -> None:
    """Raises OptionError where two sizes that are multiplied with each other differ."""
    if first != second:
        raise OptionError(f"{first_name} is {first}, but {second_name} is {second}: they must be equal.")


def lanes_fit(count: int, in_features: int, name: str) -> None:
    """Raises OptionError where there are more lanes along K than input features."""
    if count > in_features:
        raise OptionError(
            f"assumptions.lanes_k is {count}, more than the {in_features} input features of {name}: some "
            "lanes would never work. Take fewer lanes."
        )


def divides(name: str, count: int, size_name: str, size: int) -> None:
    """Raises OptionError where a number of groups does not divide what it groups."""
    if size % count:
        raise OptionError(f"{name} is {count}, which does not divide {size_name} = {size}.")
