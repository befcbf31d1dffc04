"""The schemes by name: every module of this folder but this one is a scheme."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from pathlib import Path

from mixq_compile.errors import unknown_name
from mixq_compile.scheme import QuantScheme

ALIASES = {"eetq": "w8a16"}
"""Names under which others know a scheme; everything shows the scheme's own."""

_PACKAGE, _, _OWN_NAME = __name__.rpartition(".")
_FOLDER = str(Path(__file__).parent)


@functools.cache
def scheme_names() -> tuple[str, ...]:
    """Names of all schemes: one module each in `mixq_compile.schemes`."""
    found = {module.name for module in pkgutil.iter_modules([_FOLDER])}
    return tuple(sorted(found - {_OWN_NAME}))


def accepted_names() -> tuple[str, ...]:
    """What a user may call schemes: their names, and other names of the same."""
    return (*scheme_names(), *sorted(ALIASES))


def get_scheme(name: str | QuantScheme) -> QuantScheme:
    """The scheme of this name or alias, or the one given.

    Raises OptionError that lists the valid names.
    """
    if isinstance(name, QuantScheme):
        scheme = name
    else:
        name = ALIASES.get(name, name)
        if name not in scheme_names():
            raise unknown_name("scheme", name, accepted_names())
        scheme = importlib.import_module(f"{_PACKAGE}.{name}").SCHEME
    return scheme
