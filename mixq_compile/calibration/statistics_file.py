"""The file of calibration statistics: safetensors with the facts as JSON in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mixq_compile.errors import StatisticsError

METADATA_KEY = "mixq_calibration"


def write(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes facts and tensors so that `path` holds the old file or the whole new one, never a part.

    Raises StatisticsError where the file cannot be written.
    """
    # Cloned because safetensors refuses tensors that share memory, as those of a shared module may.
    owned = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    content = save(owned, metadata={METADATA_KEY: json.dumps(facts)})
    # In the same folder, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StatisticsError(
            f"cannot write the statistics to {path}: {error.strerror or error}. "
            "Give a file name in an existing folder that you may write to."
        ) from error


def read(path: Path, schema_versions: Collection[int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts and tensors in `path`.

    Raises StatisticsError where the file is missing, damaged, no statistics, or of another schema
    version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise unreadable(path, error.strerror or str(error), "Give the path of a saved file.") from error
    except SafetensorError as error:
        raise unreadable(path, f"it is damaged, cut short, or no safetensors file ({error})") from error
    return _facts(path, metadata, schema_versions), tensors


def unreadable(
    path: Path, why: str, remedy: str = "Calibrate the model again, or copy the file again."
) -> StatisticsError:
    """The error for a file that cannot be used: why, and what to do."""
    return StatisticsError(f"cannot read statistics from {path}: {why}. {remedy}")


def _facts(path: Path, metadata: dict[str, str], schema_versions: Collection[int]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise unreadable(
            path,
            "it is a safetensors file without calibration statistics (a model's weights, perhaps)",
            "Give a file that CalibrationStats.save or `mixq calibrate` wrote.",
        )
    try:
        facts = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise unreadable(path, f"its header is damaged ({error})") from error
    version = facts.get("schema_version") if isinstance(facts, dict) else None
    if version not in schema_versions:
        known = " and ".join(str(known) for known in schema_versions)
        raise unreadable(
            path,
            f"it has schema version {version!r}, and this release reads version {known}",
            "Calibrate the model again with this release, or use the release that wrote it.",
        )
    return dict(facts)
