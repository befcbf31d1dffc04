"""Measured speed-ups over the 16-bit linear: shipped for some GPUs, and kept on disk for this one."""

from __future__ import annotations

import bisect
import functools
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixq_compile.cache_folder import CACHE_VARIABLE, cache_directory, cached, writable_cache_directory

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "tables"
FORMAT = 1

Shape = tuple[int, int, int]
"""Bits of a weight code, N and K."""


@dataclass
class SpeedTable:
    """Time of the 16-bit linear over the quantized one, everything included, by shape and rows."""

    device: str
    """The GPU's name."""
    entries: dict[Shape, dict[int, float]] = field(default_factory=dict)

    def add(self, shape: Shape, rows: int, speedup: float) -> None:
        """Records one measurement, in place of an older one."""
        self.entries.setdefault(shape, {})[rows] = speedup

    def at(self, shape: Shape, rows: int) -> float | None:
        """The speed-up of a measured shape, between measured rows interpolated; None if not measured."""
        measured = self.entries.get(shape)
        return interpolate(measured, rows) if measured else None

    def near(self, shape: Shape, rows: int) -> float | None:
        """The speed-up of the measured shape nearest to this one; None where none has these bits."""
        bits, features, columns = shape
        wanted = (math.log(features), math.log(columns))
        known = [other for other in self.entries if other[0] == bits]
        if not known:
            return None
        nearest = min(known, key=lambda other: math.dist(wanted, (math.log(other[1]), math.log(other[2]))))
        return interpolate(self.entries[nearest], rows)

    def to_json(self) -> dict[str, Any]:
        """Shapes as a list, in order."""
        shapes = [
            {
                "bits": bits, "out_features": features, "in_features": columns,
                "speedup": {str(rows): round(ratio, 3) for rows, ratio in sorted(measured.items())},
            }
            for (bits, features, columns), measured in sorted(self.entries.items())
        ]  # fmt: skip
        return {"format": FORMAT, "device": self.device, "shapes": shapes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SpeedTable:
        """Raises ValueError where this is no table of a known format."""
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, but this version reads {FORMAT}")
            table = cls(data["device"])
            for entry in data["shapes"]:
                shape = (int(entry["bits"]), int(entry["out_features"]), int(entry["in_features"]))
                table.entries[shape] = {int(rows): float(gain) for rows, gain in entry["speedup"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no table of speed-ups: {error!r}") from error
        return table


def interpolate(measured: Mapping[int, float], rows: int) -> float:
    """Linear in the logarithm of the rows; beyond the measured ones, the outermost value."""
    counts = sorted(measured)
    above = bisect.bisect_left(counts, rows)
    if above == 0 or above == len(counts):
        return measured[counts[min(above, len(counts) - 1)]]
    low, high = counts[above - 1], counts[above]
    part = (math.log(rows) - math.log(low)) / (math.log(high) - math.log(low))
    return measured[low] + part * (measured[high] - measured[low])


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@functools.cache
def shipped(device: str) -> SpeedTable | None:
    """The table in this package for a GPU of this name; None where it has none."""
    path = SHIPPED / f"{_slug(device)}.json"
    return SpeedTable.from_json(json.loads(path.read_text())) if path.exists() else None


def cache_file(device: str) -> Path:
    """Where this machine's measurements lie, or would: in the package's cache folder."""
    return cached(f"speed-{_slug(device)}-torch-{_slug(torch.__version__)}.json")


@functools.cache
def tuned(device: str) -> SpeedTable:
    """This machine's own measurements, empty where there are none; the same object in every call."""
    path = cache_file(device)
    if path.exists():
        try:
            return SpeedTable.from_json(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read and is measured anew: %s", path, error)
    return SpeedTable(device)


def save(table: SpeedTable) -> Path:
    """Writes this machine's measurements, all at once; a folder that cannot be written costs a warning."""
    path = writable_cache_directory() / cache_file(table.device).name
    if path.parent != cache_directory():
        log.warning(
            "%s cannot be written: measured speeds are kept in %s. Set %s.",
            cache_directory(), path.parent, CACHE_VARIABLE,
        )  # fmt: skip
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(table.to_json(), file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("measured speeds cannot be kept in %s: %s. Set %s.", path.parent, error, CACHE_VARIABLE)
    return path
