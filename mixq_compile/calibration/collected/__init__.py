"""What calibration can collect: one kind of statistics a file, each with its accumulator and its value."""

from __future__ import annotations

from collections.abc import Sequence

from mixq_compile.calibration.collected import gram, sample
from mixq_compile.errors import OptionError, unknown_name

KINDS = ("channels", "gram", "sample")
"""Every kind, in the order in which they are listed and hashed."""
FURTHER = {"gram": gram, "sample": sample}
"""The kinds that are collected on demand: one tensor each."""


def checked_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """These kinds and `channels`, in order, each once.

    Raises OptionError where one is unknown, where there is none, or for a text instead of a tuple.
    """
    if isinstance(kinds, str):
        raise OptionError(f"kinds must be a tuple of names, not the text {kinds!r}: give kinds=({kinds!r},).")
    wanted = tuple(kinds)
    if not wanted:
        raise OptionError(f"kinds must name what to collect, at least one of {', '.join(KINDS)}.")
    for kind in wanted:
        if kind not in KINDS:
            raise unknown_name("kind of statistics", kind, KINDS)
    return tuple(kind for kind in KINDS if kind == "channels" or kind in wanted)
