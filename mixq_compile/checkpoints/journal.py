"""The journal of a directory that is being written: what it is made of, and which files are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixq_compile.errors import CheckpointError, OptionError

JOURNAL = ".mixq-journal.jsonl"
UNFINISHED = ".unfinished"
"""What is added to the name of a file until it is whole."""


def sync_directory(directory: Path) -> None:
    """Makes renames in a directory survive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Journal:
    """Lines of JSON, each synced to disk before the next step: the making first, then a line a file."""

    path: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size and hash of each file that is whole."""

    @classmethod
    def begin(cls, directory: Path, making: Mapping[str, Any]) -> Journal:
        """The journal of a directory, which goes on where it stopped; a torn last line is dropped.

        Raises OptionError where the directory was begun with another `making`.
        """
        journal = cls(directory / JOURNAL)
        lines = list(_whole_lines(journal.path)) if journal.path.is_file() else []
        if lines:
            journal._continue(lines, making)
        if not journal.files:
            journal._write([{"making": making}])
        sync_directory(directory)
        return journal

    def _continue(self, lines: list[dict[str, Any]], making: Mapping[str, Any]) -> None:
        begun = lines[0].get("making")
        if begun != json.loads(json.dumps(making)):
            given = json.loads(json.dumps(making))
            before = begun if isinstance(begun, dict) else {}
            changed = [name for name in given if before.get(name) != given[name]]
            raise OptionError(
                f"{self.path.parent} was begun with other options or from other files "
                f"({', '.join(changed) or 'unknown'} differ): give the same ones to go on, or another "
                "directory, or --overwrite to begin again."
            )
        self.files = {line["file"]: line for line in lines[1:] if isinstance(line.get("file"), str)}
        self._write([{"making": making}, *self.files.values()])

    def _write(self, lines: list[dict[str, Any]]) -> None:
        """Writes the journal anew, without what was torn."""
        temporary = self.path.with_name(self.path.name + UNFINISHED)
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def is_whole(self, file: Path) -> bool:
        """True where a file was finished, and has the size that it had then."""
        line = self.files.get(file.name)
        return line is not None and file.is_file() and file.stat().st_size == line.get("bytes")

    def add(self, file: Path, sha256: str) -> None:
        """Notes that a file is whole."""
        line = {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256}
        self.files[file.name] = line
        with open(self.path, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def end(self) -> None:
        """Takes the journal away, because the directory is complete."""
        self.path.unlink(missing_ok=True)
        sync_directory(self.path.parent)


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error
    for line in text.splitlines(keepends=True):
        try:
            found = json.loads(line)
        except ValueError:
            return
        if not line.endswith("\n") or not isinstance(found, dict):
            return
        yield found
