"""The schemes by name: the modules of this folder but this one, those of other packages, registered ones."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mixq_compile.errors import OptionError, unknown_name
from mixq_compile.scheme import QuantScheme

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ALIASES = {"eetq": "w8a16"}
"""Names under which others know a scheme; everything shows the scheme's own."""
ENTRY_POINTS = "mixq_compile.schemes"
"""The group of entry points by which other packages bring schemes: a name, and where its QuantScheme is."""

_PACKAGE, _, _OWN_NAME = __name__.rpartition(".")
_FOLDER = str(Path(__file__).parent)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_REGISTERED: dict[str, QuantScheme] = {}


@functools.cache
def _module_names() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules([_FOLDER])) - {_OWN_NAME}


@functools.cache
def _entry_points() -> dict[str, EntryPoint]:
    """The schemes of other packages; a name of this package's is this package's."""
    from importlib.metadata import entry_points

    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    return {name: entry for name, entry in found.items() if name not in {*_module_names(), *ALIASES}}


def scheme_names() -> tuple[str, ...]:
    """Names of all schemes: the modules of `mixq_compile.schemes`, entry points, and registered ones."""
    return tuple(sorted({*_module_names(), *_entry_points(), *_REGISTERED}))


def accepted_names() -> tuple[str, ...]:
    """What a user may call schemes: their names, and other names of the same."""
    return (*scheme_names(), *sorted(ALIASES))


def register(scheme: QuantScheme) -> QuantScheme:
    """Makes a scheme known by its name in this process, for every option that takes one; returns it.

    Raises OptionError for a name that is no identifier, and where another scheme has it.
    """
    if not _NAME.fullmatch(scheme.name):
        raise OptionError(
            f"the name of a scheme is letters, digits and underscores, not {scheme.name!r}: it stands in the "
            "texts of pipelines."
        )
    if scheme.name in accepted_names() and get_scheme(scheme.name) != scheme:
        raise OptionError(
            f"another scheme is called {scheme.name!r}: give this one a name of its own, or that name as a "
            "text, and threshold, capacity and miss as options."
        )
    if scheme.name not in scheme_names():
        _REGISTERED[scheme.name] = scheme
    return scheme


def get_scheme(name: str | QuantScheme) -> QuantScheme:
    """The scheme of this name or alias, or the one given.

    Raises OptionError that lists the valid names, and where an entry point has no scheme of its name.
    """
    if isinstance(name, QuantScheme):
        return name
    name = ALIASES.get(name, name)
    if name not in scheme_names():
        raise unknown_name("scheme", name, accepted_names())
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in _entry_points():
        return _loaded(_entry_points()[name])
    scheme: QuantScheme = importlib.import_module(f"{_PACKAGE}.{name}").SCHEME
    return scheme


def _loaded(entry: EntryPoint) -> QuantScheme:
    try:
        found = entry.load()
    except Exception as error:
        raise OptionError(
            f"scheme {entry.name!r} is the entry point {entry.value!r} of another package, which failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, QuantScheme) or found.name != entry.name:
        what = f"a scheme called {found.name!r}" if isinstance(found, QuantScheme) else repr(found)
        raise OptionError(
            f"scheme {entry.name!r} is the entry point {entry.value!r} of another package, which is {what} "
            f"and must be a QuantScheme called {entry.name!r}."
        )
    return found
