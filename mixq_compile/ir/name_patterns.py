"""Patterns by which people name linears: one rule for `ignore`, `layers`, `--fqn` and `explain`."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Collection, Iterable

from mixq_compile.errors import OptionError

REGULAR = "re:"
EVERYTHING = ("", "*", "**", "*.*", "re:.*")
"""Patterns that name no linear in particular."""


@functools.lru_cache(maxsize=4096)
def _regular(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix(REGULAR))
    except re.error as error:
        raise OptionError(f"the pattern {pattern!r} is no regular expression: {error}.") from error


def name_matches(fqn: str, pattern: str) -> bool:
    """True if a pattern means this name.

    It is any run of its dotted parts, such as `mlp.down_proj` or `model.layers.0`; a glob for such a run,
    such as `layers.*.q_proj`; or `re:` and a regular expression for the whole name. Raises OptionError for
    a wrong expression.
    """
    if pattern.startswith(REGULAR):
        return _regular(pattern).fullmatch(fqn) is not None
    if not pattern:
        return False
    if not set(pattern) & set("*?["):
        return f".{pattern}." in f".{fqn}."
    return any(
        fnmatch.fnmatchcase(fqn, f"{before}{pattern}{behind}")
        for before in ("", "*.")
        for behind in ("", ".*")
    )


def names_explicitly(fqn: str, patterns: Iterable[str]) -> bool:
    """True where one of the patterns means this linear and not simply every one."""
    return any(name_matches(fqn, pattern) for pattern in patterns if pattern not in EVERYTHING)


def unmatched(patterns: Iterable[str], fqns: Collection[str]) -> list[str]:
    """The patterns that mean none of these names."""
    return [pattern for pattern in patterns if not any(name_matches(fqn, pattern) for fqn in fqns)]


def no_match(option: str, pattern: str, fqns: Collection[str], where: str) -> str:
    """What to tell about a pattern of an option that means no linear of `where`."""
    parts = {part for fqn in fqns for part in (fqn, *fqn.split("."))}
    near = difflib.get_close_matches(pattern.removeprefix(REGULAR), parts, n=1)
    hint = (
        f" Did you mean {near[0]!r}?" if near else f" It has {', '.join(list(fqns)[:3])}, …" if fqns else ""
    )
    return (
        f"mixq: {option} holds {pattern!r}, which matches none of the {len(fqns)} linears of {where}.{hint} "
        "A pattern is a run of dotted parts (mlp.down_proj), a glob (layers.*.q_proj) or re:EXPRESSION."
    )
