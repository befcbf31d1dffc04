"""The file of calibration statistics: safetensors with the facts as JSON in its metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mixq_compile.calibration.statistics import (
    SCHEMA_VERSION,
    TENSOR_FIELDS,
    CalibrationStats,
    LinearStatistics,
)
from mixq_compile.errors import StatisticsError

METADATA_KEY = "mixq_calibration"


def write(stats: CalibrationStats, path: Path) -> None:
    """Writes the statistics so that `path` holds the old file or the whole new one, never a part.

    Raises StatisticsError where the file cannot be written.
    """
    facts = {
        "schema_version": SCHEMA_VERSION,
        "package_version": stats.package_version,
        "model_class": stats.model_class,
        "dtype": stats.dtype,
        "total_rows": stats.total_rows,
        "thresholds": stats.thresholds,
        "never_run": stats.never_run,
        "linears": {
            fqn: {"rows": entry.rows, "nonfinite_rows": entry.nonfinite_rows}
            for fqn, entry in stats.linears.items()
        },
        "sha256": stats.sha256(),
    }
    # Cloned because safetensors refuses tensors that share memory, as those of a shared module may.
    tensors = {
        f"{fqn}.{field}": getattr(entry, field).clone().contiguous()
        for fqn, entry in stats.linears.items()
        for field in TENSOR_FIELDS
    }
    content = save(tensors, metadata={METADATA_KEY: json.dumps(facts)})
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


def read(path: Path) -> CalibrationStats:
    """The statistics in `path`.

    Raises StatisticsError where the file is missing, damaged, no statistics, or of another schema
    version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "Give the path of a saved file.") from error
    except SafetensorError as error:
        raise _unreadable(path, f"it is damaged, cut short, or no safetensors file ({error})") from error
    facts = _facts(path, metadata)
    try:
        stats = _assemble(facts, tensors)
        expected = facts["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(path, f"it is damaged: {type(error).__name__} {error}") from error
    if stats.sha256() != expected:
        raise _unreadable(path, "it is damaged: its numbers do not have the sha256 that its header names")
    return stats


def _unreadable(
    path: Path, why: str, remedy: str = "Calibrate the model again, or copy the file again."
) -> StatisticsError:
    return StatisticsError(f"cannot read statistics from {path}: {why}. {remedy}")


def _facts(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise _unreadable(
            path,
            "it is a safetensors file without calibration statistics (a model's weights, perhaps)",
            "Give a file that CalibrationStats.save or `mixq calibrate` wrote.",
        )
    try:
        facts = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise _unreadable(path, f"its header is damaged ({error})") from error
    version = facts.get("schema_version") if isinstance(facts, dict) else None
    if version != SCHEMA_VERSION:
        raise _unreadable(
            path,
            f"it has schema version {version!r}, and this release reads version {SCHEMA_VERSION}",
            "Calibrate the model again with this release, or use the release that wrote it.",
        )
    return dict(facts)


def _assemble(facts: dict[str, Any], tensors: dict[str, Tensor]) -> CalibrationStats:
    linears: dict[str, LinearStatistics] = {}
    for fqn, counts in facts["linears"].items():
        fields = {field: tensors[f"{fqn}.{field}"] for field in TENSOR_FIELDS}
        channels = fields["absmax"].shape[0]
        for field, dtype in TENSOR_FIELDS.items():
            expected = (len(facts["thresholds"]), channels) if field == "rows_above" else (channels,)
            if fields[field].dtype != dtype or fields[field].shape != expected:
                raise ValueError(f"{fqn}.{field} is not {dtype} of shape {expected}")
        linears[fqn] = LinearStatistics(
            fqn=fqn, rows=int(counts["rows"]), nonfinite_rows=int(counts["nonfinite_rows"]), **fields
        )
    return CalibrationStats(
        linears=linears,
        never_run=tuple(facts["never_run"]),
        thresholds=tuple(facts["thresholds"]),
        model_class=str(facts["model_class"]),
        dtype=str(facts["dtype"]),
        package_version=str(facts["package_version"]),
    )
