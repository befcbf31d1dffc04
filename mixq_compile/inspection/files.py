"""Inspections in files: JSON, or the page of a report, which holds the same JSON."""

from __future__ import annotations

import json
from pathlib import Path

from mixq_compile.errors import OptionError
from mixq_compile.inspection.inspection import Inspection
from mixq_compile.inspection.island import read_island

SUFFIXES = (".json", ".html", ".htm")


def is_inspection_file(path: Path) -> bool:
    """True for a name that means a saved inspection rather than a model."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def save_json(inspection: Inspection, path: Path) -> None:
    """Writes an inspection as JSON."""
    path.write_text(json.dumps(inspection.to_json(), separators=(",", ":"), allow_nan=False) + "\n")


def load_inspection(path: Path) -> Inspection:
    """The inspection in a JSON file or in a report.

    Raises OptionError for a file that is missing, is neither, or was written by another version.
    """
    if not path.is_file():
        raise OptionError(f"{path} does not exist. `mixq inspect MODEL --json {path}` would write it.")
    text = path.read_text(errors="replace")
    try:
        if text.lstrip().startswith("<"):
            return Inspection.from_json(read_island(text)["inspection"])
        return Inspection.from_json(json.loads(text))
    except json.JSONDecodeError as error:
        raise OptionError(
            f"{path} is no inspection: neither JSON ({error}) nor a report. `mixq inspect MODEL --json FILE` "
            "and `mixq inspect MODEL --html FILE` write them."
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise OptionError(f"{path} is no whole inspection: {type(error).__name__} {error}.") from error
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
