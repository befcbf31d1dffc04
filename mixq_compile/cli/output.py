"""What commands write: results to stdout as text or JSON, progress to stderr."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mixq_compile.errors import OptionError
from mixq_compile.json_values import finite

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")

WIDTH = 120
"""Columns where the output is no terminal, which would tell its own."""
MEBIBYTE = 2**20
NEVER_FOLDED = 12
"""Characters of a cell that stay on one line."""


def console(*, stderr: bool = False) -> Console:
    """A console that respects NO_COLOR, and in a pipe does not squeeze tables into 80 columns."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH
    return Console(stderr=stderr, width=width, highlight=False, emoji=False)


def print_json(data: Any) -> None:
    """Writes JSON to stdout; infinities and NaN, which JSON lacks, become texts."""
    print(json.dumps(finite(data), indent=1, allow_nan=False))


def print_table(
    target: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1
) -> None:
    """Prints a table whose first `left` columns are text and the others figures; a cell is never markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(columns):
        if place < left:
            # A word that fits is not broken: only longer texts are folded.
            longest = max((len(row[place]) for row in rows), default=0)
            made.add_column(
                heading, overflow="fold", no_wrap=place == 0, min_width=min(longest, NEVER_FOLDED)
            )
        else:
            made.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    target.print()
    target.print(title, style="bold", markup=False)
    target.print(made)


def mebibytes(count: float) -> str:
    """A number of bytes in MiB."""
    return f"{count / MEBIBYTE:.1f}"


@contextmanager
def step(what: str, *, spinner: bool = True) -> Iterator[None]:
    """Says on stderr that something is under way, and how long it took.

    A terminal shows a spinner meanwhile, anything else gets one line when it is done. No spinner where
    what runs shows a bar of its own.
    """
    target = console(stderr=True)
    begin = time.perf_counter()
    if target.is_terminal and spinner:
        with target.status(what):
            yield
    else:
        yield
    target.print(f"{what}: {time.perf_counter() - begin:.1f} s", style="dim", markup=False)


SECONDS_BETWEEN_LINES = 15.0


def shown(items: Iterable[Item], total: int) -> Iterator[Item]:
    """The items, while stderr shows how many of them have come: a bar, or where it is no terminal lines."""
    from rich.progress import track

    target = console(stderr=True)
    if target.is_terminal:
        yield from track(items, "Scoring", total=total, console=target, transient=True)
        return
    begin = said = time.perf_counter()
    for count, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - said > SECONDS_BETWEEN_LINES and count < total:
            said = now
            left = (now - begin) / count * (total - count)
            target.print(f"{count} of {total}, about {left:.0f} s left", style="dim", markup=False)


def check_file(option: str, path: Path) -> None:
    """Raises OptionError where a file could not be written at the end of the work."""
    if path.is_dir():
        raise OptionError(f"{option} {path} is a directory: give the name of a file to write.")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise OptionError(
            f"{option} {path}: there is no folder {path.parent}: it lies in a directory that does not exist. "
            "Make it first."
        )
    _check_writable(option, path, folder)
    if path.exists() and not os.access(path, os.W_OK):
        raise OptionError(f"{option} {path}: that file cannot be written. Give another name.")


def check_folder(option: str, path: Path) -> None:
    """Raises OptionError where files could not be written into a folder, which may be made still."""
    if path.exists() and not path.is_dir():
        raise OptionError(f"{option} {path} is a file: give the name of a folder.")
    existing = next(each for each in (path.resolve(), *path.resolve().parents) if each.is_dir())
    _check_writable(option, path, existing)


def _check_writable(option: str, path: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise OptionError(
            f"{option} {path}: nothing can be written in {folder}: {error.strerror}. Give another place."
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Writes JSON to a file, whole or not at all; infinities and NaN become texts."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    made.write_text(json.dumps(finite(data), indent=1, allow_nan=False) + "\n")
    os.replace(made, path)
