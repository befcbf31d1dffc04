"""What calibration can collect: one kind of statistics a file, each with its accumulator and its value."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

from mixq_compile.errors import OptionError, unknown_name

CHANNELS = "channels"
FURTHER: dict[str, ModuleType] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
    if module.name != CHANNELS
}
"""The kinds that are collected on demand, one tensor each: every module of this folder but `channels`."""
KINDS = (CHANNELS, *FURTHER)
"""Every kind, in the order in which they are listed and hashed."""


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
