"""Patterns by which people name linears."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

EVERYTHING = ("", "*", "**", "*.*")
"""Patterns that name no linear in particular."""


def name_matches(fqn: str, pattern: str) -> bool:
    """True if the pattern is the name, one of its dotted parts, or a glob that fits it."""
    return fqn == pattern or pattern in fqn.split(".") or fnmatch.fnmatchcase(fqn, pattern)


def names_explicitly(fqn: str, patterns: Iterable[str]) -> bool:
    """True where one of the patterns means this linear and not simply every one."""
    return any(name_matches(fqn, pattern) for pattern in patterns if pattern not in EVERYTHING)
