"""Thresholds of outlier columns: magnitudes, or multiples of a row's mean magnitude such as `8x`."""

from __future__ import annotations

import math
import re
from typing import Any

from mixq_compile.errors import OptionError

Threshold = float | str
"""A magnitude (6.0, infinity for none), or a text: so many times the mean magnitude of the row (`8x`)."""

PAPER_THRESHOLD = 6.0
"""The magnitude that LLM.int8() and MixQ publish."""
DEFAULT_THRESHOLD: Threshold = "8x"
"""A multiple, because magnitudes that fit one model do not fit the next; measured, see docs/semantics.md."""

_MUST_BE = "threshold must be a number, or a multiple of the row's mean magnitude such as '8x'"
_MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)x")


def multiple_of(threshold: Threshold) -> float | None:
    """The number in `8x`; None where the threshold is a magnitude. Raises OptionError for other texts."""
    if not isinstance(threshold, str):
        return None
    match = _MULTIPLE.fullmatch(threshold)
    if match is None:
        raise OptionError(f"{_MUST_BE}, not {threshold!r}.")
    return float(match[1])


def checked(threshold: Any) -> Threshold:
    """The threshold, if it is one. Raises OptionError."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, str)):
        raise OptionError(f"{_MUST_BE}, not {threshold!r}.")
    number = multiple_of(threshold)
    if number is None:
        number = float(threshold)
    if math.isnan(number) or number <= 0:
        raise OptionError(
            f"threshold must be above 0, not {threshold}: activations whose magnitude exceeds it are kept "
            "in 16 bit. The default is '8x', eight times the row's mean magnitude; 6.0 is the "
            "papers' magnitude; use scheme 'w8a8' for none."
        )
    return threshold


def state_number(threshold: Threshold) -> float:
    """What `effective_threshold` holds on the device: a magnitude, or minus the multiple."""
    multiple = multiple_of(threshold)
    return float(threshold) if multiple is None else -multiple


def read_threshold(text: str) -> Threshold:
    """The threshold that a text writes, `6`, `inf` or `8x`. Raises OptionError."""
    try:
        number: Threshold = float(text)
    except ValueError:
        number = text
    return checked(number)
