"""What a directory will hold, told by the headers of the files that it is made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixq_compile.checkpoints.directory import SINGLE
from mixq_compile.checkpoints.safetensors_files import DTYPES, PlannedTensor, TensorEntry, header_bytes
from mixq_compile.checkpoints.schema import (
    CALIBRATED_COLUMNS,
    CALIBRATED_MAXIMA,
    COLUMNS,
    MAXIMA,
    OUTLIER_WEIGHT,
    StoredLinear,
)
from mixq_compile.weights.recipe import InputStatistics


@dataclass(frozen=True, eq=False)
class PlannedLinear:
    """How the weight of one linear is quantized."""

    stored: StoredLinear
    columns: tuple[int, ...] = ()
    """Calibrated outlier columns."""
    maxima: tuple[float, ...] = ()
    statistics: InputStatistics | None = None
    """What its recipe needs of calibration."""


@dataclass(frozen=True, eq=False)
class Step:
    """One tensor of a source: copied, or quantized."""

    source: TensorEntry
    linear: PlannedLinear | None = None

    @property
    def prefix(self) -> str:
        """What the files call the linear."""
        return self.source.name.removesuffix(".weight")

    def outputs(self) -> list[PlannedTensor]:
        """The tensors that come of it; a bias is a tensor of its own."""
        if self.linear is None:
            return [PlannedTensor(self.source.name, self.source.dtype, self.source.shape)]
        return [
            PlannedTensor(f"{self.prefix}.{leaf}", dtype, shape)
            for leaf, (dtype, shape) in self.linear.stored.tensors().items()
            if leaf != "bias"
        ]

    def small(self) -> dict[str, Tensor]:
        """The tensors of a quantized linear that are known before its weight is read."""
        assert self.linear is not None
        found = {"weight": torch.full((1,), torch.nan, dtype=torch.float32, device="cpu")}
        if self.linear.columns:
            columns = torch.tensor(self.linear.columns, dtype=torch.int32, device="cpu")
            maxima = torch.tensor(self.linear.maxima, dtype=torch.float32, device="cpu")
            found |= {
                COLUMNS: columns, MAXIMA: maxima, CALIBRATED_COLUMNS: columns, CALIBRATED_MAXIMA: maxima,
            }  # fmt: skip
        return {f"{self.prefix}.{leaf}": tensor for leaf, tensor in found.items()}

    @property
    def outlier_weight(self) -> str:
        """The name of the 16-bit weights of its columns."""
        return f"{self.prefix}.{OUTLIER_WEIGHT}"


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    name: str
    steps: tuple[Step, ...]
    header: bytes = field(repr=False)
    places: Mapping[str, tuple[int, int]] = field(repr=False)
    """Where each tensor begins in the file, and its bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return max((begin + size for begin, size in self.places.values()), default=len(self.header))

    @property
    def source_bytes(self) -> int:
        """Bytes that are read for it."""
        return sum(step.source.nbytes for step in self.steps)


def shards(steps: Sequence[Step], most_bytes: int) -> list[Shard]:
    """The files of these steps, in their order; each holds what one source file held, or a part of it."""
    groups: list[list[Step]] = []
    size, path = 0, None
    for step in steps:
        nbytes = sum(tensor.nbytes for tensor in step.outputs())
        if not groups or step.source.path != path or size + nbytes > most_bytes:
            groups.append([])
            size, path = 0, step.source.path
        groups[-1].append(step)
        size += nbytes
    count = len(groups)
    return [
        _shard(SINGLE if count == 1 else f"model-{place:05d}-of-{count:05d}.safetensors", group)
        for place, group in enumerate(groups, 1)
    ]


def _shard(name: str, steps: list[Step]) -> Shard:
    # The widest dtypes first, so that every tensor begins at a multiple of its own.
    tensors = sorted(
        (tensor for step in steps for tensor in step.outputs()),
        key=lambda tensor: -DTYPES[tensor.dtype].itemsize,
    )
    header = header_bytes(tensors)
    places, end = {}, len(header)
    for tensor in tensors:
        places[tensor.name] = end, tensor.nbytes
        end += tensor.nbytes
    return Shard(name, tuple(steps), header, places)


def fingerprint(files: Sequence[Path], tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """What says that source files are still the same: sizes, times, and a hash of their headers."""
    lines = sorted(f"{each.name} {each.dtype} {each.shape} {each.path.name}" for each in tensors.values())
    return {
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "headers": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    }


def plan_hash(planned: Sequence[Shard]) -> str:
    """A hash of what will be written, but for the numbers in it."""
    digest = hashlib.sha256()
    for shard in planned:
        digest.update(shard.name.encode() + shard.header)
        for step in shard.steps:
            if step.linear is not None:
                stored = step.linear.stored
                digest.update(json.dumps([stored.recipe, step.linear.columns, step.linear.maxima]).encode())
                if step.linear.statistics is not None:
                    digest.update(step.linear.statistics.source.encode())
    return digest.hexdigest()


def row_blocks(rows: int, columns: int, most_elements: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each block of a matrix."""
    size = max(1, most_elements // max(columns, 1))
    for first in range(0, rows, size):
        yield first, min(size, rows - first)
