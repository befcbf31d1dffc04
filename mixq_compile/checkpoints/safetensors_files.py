"""The headers of safetensors files: read and checked without a mapping, and written before the data.

Mapped files count as resident memory, and their faults are signals, not errors: everything here is `pread`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixq_compile.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""The dtypes by the names that headers give them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
ALIGNMENT = 8
LONGEST_HEADER = 100_000_000
"""More is no header: the limit of the safetensors library."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    name: str
    dtype: str
    """As headers name it, such as `BF16`."""
    shape: tuple[int, ...]
    path: Path
    begin: int
    """Where its bytes begin in the file."""
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype. Raises CheckpointError for one that torch or this release does not know."""
        found = DTYPES.get(self.dtype)
        if found is None:
            raise CheckpointError(
                f"{self.path} holds {self.name!r} as {self.dtype}, which this release does not read."
            )
        return found

    def read(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        flat = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        with open(self.path, "rb", buffering=0) as file:
            read_at(file.fileno(), self.begin, flat, self.path)
        return flat.view(self.torch_dtype).reshape(self.shape)


def read_at(descriptor: int, offset: int, into: Tensor, path: Path) -> None:
    """Fills a contiguous tensor of bytes from a place of a file. Raises CheckpointError where that ends."""
    view = memoryview(into.numpy().data).cast("B")
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], offset + done)
        if got == 0:
            raise CheckpointError(
                f"{path} ends at byte {offset + done}, and its header promises {offset + len(view)}: it was "
                "cut off. Download or write it again."
            )
        done += got


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, in the order of their bytes.

    Raises CheckpointError where the file is missing, is no safetensors file, or holds fewer or more bytes
    than its header says.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb", buffering=0) as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, LONGEST_HEADER):
                raise CheckpointError(
                    f"{path} is corrupt: its header would have {length} bytes, and the file has {size}. "
                    "Download or write it again."
                )
            text = b""
            while len(text) < length:
                part = file.read(length - len(text))
                if not part:
                    raise CheckpointError(f"{path} is corrupt: it ends inside its header.")
                text += part
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [_entry(path, name, entry, LENGTH_BYTES + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is corrupt: its header is no list of tensors ({type(error).__name__}: {error}). "
            "Download or write it again."
        ) from error
    entries.sort(key=lambda entry: (entry.begin, entry.nbytes))
    end = LENGTH_BYTES + length
    for entry in entries:
        if entry.begin != end:
            raise CheckpointError(
                f"{path} is corrupt: {entry.name!r} begins at byte {entry.begin}, and the tensor before it "
                f"ends at {end}. Download or write it again."
            )
        end += entry.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} is corrupt: its tensors end at byte {end}, and the file has {size}: it was cut off or "
            "written to. Download or write it again."
        )
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, entry: Mapping[str, Any], data: int) -> TensorEntry:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    whole = all(isinstance(value, int) and value >= 0 for value in (*shape, begin, end))
    if not whole or not isinstance(dtype, str) or begin > end:
        raise ValueError(f"{name!r} has shape {shape!r} at {begin!r} to {end!r}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name!r} has {end - begin} bytes, and {dtype} {list(shape)} takes another number")
    return TensorEntry(name, dtype, shape, path, data + begin, end - begin)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a file to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def header_bytes(tensors: Iterable[PlannedTensor]) -> bytes:
    """The bytes before the data of a file that holds these tensors in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
