"""`mixq.save` and `mixq.load`: exported programs in files that a fresh process reads."""

from __future__ import annotations

import importlib
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from mixq_compile.errors import CheckpointError, OptionError
from mixq_compile.version import __version__

SCHEMA_VERSION = 1
FACTS = "mixq.json"
"""The file in the archive that says what wrote it; `torch.export.save` alone writes none."""
_TYPES = re.compile(
    rb'\\*"type\\*": \\*"(?P<module>(?:transformers|diffusers|sentence_transformers)[\w.]*)\.\w+'
)
"""Structures of inputs and outputs that those packages register where they are imported."""


def save(program: ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Writes an exported program, such as `compile` returns, to a `.pt2` file, whole or not at all.

    `load` reads it, and so does `torch.export.load` after `import mixq_compile.ops` and the packages whose
    classes its inputs and outputs are of. Raises OptionError for anything else than a program.
    """
    if not isinstance(program, ExportedProgram):
        raise OptionError(
            f"save takes an exported program, as mixq_compile.compile returns first, not "
            f"{type(program).__name__}. For a quantized model there is mixq_compile.save_pretrained."
        )
    target = Path(path)
    facts = {"schema": SCHEMA_VERSION, "mixq_compile": __version__, "torch": torch.__version__}
    made = target.with_name(f".{target.stem}.{os.getpid()}.pt2")
    try:
        torch.export.save(program, made, extra_files={FACTS: json.dumps(facts)})
        os.replace(made, target)
    finally:
        made.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> ExportedProgram:
    """The program of a file that `save` or `torch.export.save` wrote.

    Its operators are registered first, and what transformers and the like know of the structures that it
    takes and returns. Run it by its `module()`. Raises CheckpointError for a file that is none, or that a
    later release wrote.
    """
    import mixq_compile.ops  # noqa: F401 - registers the operators

    source = Path(path)
    try:
        with zipfile.ZipFile(source) as archive:
            _check(source, _facts(archive))
            _import_types(source, archive)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {source}.") from error
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"{source} is no exported program: {error}. mixq_compile.save and torch.export.save write one."
        ) from error
    try:
        return torch.export.load(source)
    except Exception as error:
        cause = error.__cause__ or error.__context__ or error
        why = next(iter(str(cause).splitlines()), "")
        raise CheckpointError(
            f"{source} cannot be read: {type(cause).__name__}: {why} "
            "If it takes or returns classes of a package of yours, import that first."
        ) from error


def _facts(archive: zipfile.ZipFile) -> dict[str, Any]:
    """What `save` wrote about a file; empty for one that torch.export.save alone wrote."""
    name = next((name for name in archive.namelist() if name.endswith(f"/extra/{FACTS}")), None)
    found: dict[str, Any] = json.loads(archive.read(name)) if name is not None else {}
    return found


def _check(source: Path, facts: dict[str, Any]) -> None:
    schema = facts.get("schema", SCHEMA_VERSION)
    if schema != SCHEMA_VERSION:
        raise CheckpointError(
            f"{source} has schema version {schema}, written by mixq-compile {facts.get('mixq_compile')}; "
            f"this release, {__version__}, reads version {SCHEMA_VERSION}. Install that one, or save again."
        )


def _import_types(source: Path, archive: zipfile.ZipFile) -> None:
    texts = (archive.read(name) for name in archive.namelist() if name.endswith(".json"))
    for module in sorted({match["module"].decode() for text in texts for match in _TYPES.finditer(text)}):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise CheckpointError(
                f"{source} takes or returns classes of {module}, which cannot be imported: {error}."
            ) from error
