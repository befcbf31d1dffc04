"""Where compiled kernels and measurements of this machine are kept between processes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CACHE_VARIABLE = "MIXQ_CACHE_DIR"
NAME = "mixq_compile"


def cache_directory() -> Path:
    """The folder: $MIXQ_CACHE_DIR, else mixq_compile in the user's cache folder, else one of temporary files.

    The last is for users without a home, as containers run them. Nothing is made.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / NAME
    try:
        return Path.home() / ".cache" / NAME
    except RuntimeError:
        return _temporary()


def writable_cache_directory() -> Path:
    """The folder, made where it is missing; one of temporary files where it cannot be written."""
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError:
        return _own(_temporary())


def cached(name: str) -> Path:
    """The path of a kept file: where it lies, or else where it would."""
    usual = cache_directory() / name
    if usual.exists():
        return usual
    other = _temporary() / name
    return other if _is_own(other.parent) and other.exists() else usual


def _temporary() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"{NAME}_{user}"


def _is_own(directory: Path) -> bool:
    """True for a folder that nobody else can write: what lies there is loaded and run."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    mine = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
    return directory.is_dir() and not directory.is_symlink() and mine


def _own(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f"{NAME}_"))
    return directory if _is_own(directory) else Path(tempfile.mkdtemp(prefix=f"{NAME}_"))
