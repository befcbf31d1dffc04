"""Quantizes from file to file, a block of rows at a time: memory follows the block, not the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from mixq_compile.checkpoints.directory import file_hash
from mixq_compile.checkpoints.file_plan import PlannedLinear, Shard, Step, row_blocks
from mixq_compile.checkpoints.journal import UNFINISHED, Journal, sync_directory
from mixq_compile.checkpoints.safetensors_files import TensorEntry, read_at
from mixq_compile.errors import CheckpointError
from mixq_compile.kernels.cpu import weight_rounding
from mixq_compile.weights import recipe as recipes
from mixq_compile.weights.quantized_weight import QuantizedWeight

BLOCK_ELEMENTS = 2 << 20
COPY_BYTES = 4 << 20
ERROR_ROWS = 16
SYNC_BYTES = 256 << 20
"""After so many bytes what was written goes to disk: else the system keeps all of it for the end."""

Progress = Callable[[int, str, float | None], None]
"""Called with the bytes read, the linear that is done (or an empty text), and its relative error."""


class Writer:
    """A file of known size whose tensors are written in any order, and which is whole or not there."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self.path, self.shard = path, shard
        self.temporary = path.with_name(path.name + UNFINISHED)
        self._since = 0
        self._syncing: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1)
        self.descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(self.descriptor, 0, shard.nbytes)
        except OSError as error:
            os.close(self.descriptor)
            self.temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path} needs {shard.nbytes / 1e9:.2f} GB, which {path.parent} does not have "
                f"({error.strerror or error}): make room there, and give the same command again to go on."
            ) from error
        self._put(0, torch.frombuffer(bytearray(shard.header), dtype=torch.uint8))

    def write(self, name: str, offset: int, tensor: Tensor) -> None:
        """Writes a contiguous part of a tensor; `offset` is in bytes from its begin."""
        begin, size = self.shard.places[name]
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert offset + flat.numel() <= size, f"{name} is longer than planned"
        self._put(begin + offset, flat)

    def _put(self, place: int, flat: Tensor) -> None:
        view = memoryview(flat.numpy().data).cast("B")
        done = 0
        while done < len(view):
            done += os.pwrite(self.descriptor, view[done:], place + done)
        self._since += done
        if self._since > SYNC_BYTES:
            self._wait()
            self._syncing = self._pool.submit(os.fdatasync, self.descriptor)
            self._since = 0

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def finish(self) -> str:
        """Syncs and renames the file; returns its hash."""
        self._wait()
        self._pool.shutdown()
        os.fsync(self.descriptor)
        self._close()
        sha256 = file_hash(self.temporary)
        os.replace(self.temporary, self.path)
        sync_directory(self.path.parent)
        return sha256

    def give_up(self) -> None:
        """Leaves nothing behind."""
        self._pool.shutdown(cancel_futures=True)
        self._close()
        self.temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


class Reader:
    """Parts of tensors, the next one read while one is worked on, in two buffers that are used in turn."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._files: dict[Path, int] = {}
        self._buffers = [torch.empty(0, dtype=torch.uint8, device="cpu") for _ in range(2)]

    def close(self) -> None:
        """Closes the files."""
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def _read(self, place: int, entry: TensorEntry, offset: int, nbytes: int) -> Tensor:
        flat = self._buffers[place % 2][:nbytes]
        descriptor = self._descriptor(entry.path)
        read_at(descriptor, entry.begin + offset, flat, entry.path)
        # It is read once: keeping it would push out of memory what others need.
        os.posix_fadvise(descriptor, entry.begin + offset, nbytes, os.POSIX_FADV_DONTNEED)
        return flat

    def parts(self, entry: TensorEntry, ranges: list[tuple[int, int]]) -> Iterator[Tensor]:
        """Bytes of a tensor, range by range (offset and size); each is good until the next is asked for."""
        largest = max((size for _, size in ranges), default=0)
        for place in range(min(2, len(ranges))):
            if self._buffers[place].numel() < largest:
                self._buffers[place] = torch.empty(largest, dtype=torch.uint8, device="cpu")
        pending: Future[Tensor] | None = None
        for place, part in enumerate(ranges):
            current = pending or self._pool.submit(self._read, place, entry, *part)
            data = current.result()
            pending = None
            if place + 1 < len(ranges):
                pending = self._pool.submit(self._read, place + 1, entry, *ranges[place + 1])
            yield data


def write_shards(
    planned: list[Shard],
    directory: Path,
    journal: Journal,
    *,
    device: torch.device,
    progress: Progress,
    verify: bool = False,
) -> None:
    """Writes the files that the journal does not have yet. Raises CheckpointError where one cannot be."""
    for leftover in directory.glob(f"*{UNFINISHED}"):
        leftover.unlink()
    reader, finishing = Reader(), ThreadPoolExecutor(1)
    pending: Future[None] | None = None
    try:
        for shard in planned:
            path = directory / shard.name
            if journal.is_whole(path) and not (verify and _differs(path, journal)):
                progress(shard.source_bytes, "", None)
                continue
            writer = _write_shard(shard, path, reader, device, progress)
            if pending is not None:
                pending.result()
            # Syncing and hashing one file goes on while the next one is written.
            pending = finishing.submit(_finish, writer, journal)
        if pending is not None:
            pending.result()
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be written ({error.strerror or error}): see to disk space and rights, and "
            "give the same command again to go on."
        ) from error
    finally:
        finishing.shutdown()
        reader.close()


def _finish(writer: Writer, journal: Journal) -> None:
    try:
        sha256 = writer.finish()
    except BaseException:
        writer.give_up()
        raise
    journal.add(writer.path, sha256)


def _differs(path: Path, journal: Journal) -> bool:
    return bool(file_hash(path) != journal.files[path.name]["sha256"])


def _write_shard(
    shard: Shard, path: Path, reader: Reader, device: torch.device, progress: Progress
) -> Writer:
    writer = Writer(path, shard)
    try:
        for step in shard.steps:
            if step.linear is None:
                _copy(step, reader, writer, progress)
            else:
                _quantize(step, reader, writer, device, progress)
    except BaseException:
        writer.give_up()
        raise
    return writer


def _copy(step: Step, reader: Reader, writer: Writer, progress: Progress) -> None:
    nbytes = step.source.nbytes
    ranges = [(begin, min(COPY_BYTES, nbytes - begin)) for begin in range(0, nbytes, COPY_BYTES)]
    done = 0
    for data in reader.parts(step.source, ranges):
        writer.write(step.source.name, done, data)
        done += data.numel()
        progress(data.numel(), "", None)


def _matrix_blocks(step: Step, reader: Reader, whole: bool) -> Iterator[tuple[int, Tensor, int]]:
    """First row, rows and bytes read of each block of a weight `[N, K]`; all rows at once where asked for."""
    assert step.linear is not None
    entry, stored = step.source, step.linear.stored
    rows, columns = stored.out_features, stored.in_features
    if stored.transposed or whole:
        (data,) = reader.parts(entry, [(0, entry.nbytes)])
        matrix = data.view(entry.torch_dtype).reshape(entry.shape)
        yield 0, matrix.t().contiguous() if stored.transposed else matrix, entry.nbytes
        return
    width = columns * entry.torch_dtype.itemsize
    blocks = list(row_blocks(rows, columns, BLOCK_ELEMENTS))
    parts = reader.parts(entry, [(first * width, count * width) for first, count in blocks])
    for (first, count), data in zip(blocks, parts, strict=True):
        yield first, data.view(entry.torch_dtype).reshape(count, columns), data.numel()


def _quantize(step: Step, reader: Reader, writer: Writer, device: torch.device, progress: Progress) -> None:
    assert step.linear is not None
    linear, stored = step.linear, step.linear.stored
    recipe = stored.scheme.recipe
    # Factors of low rank and errors that are fed back are of a whole matrix.
    whole = recipe.low_rank is not None or bool(recipes.needs(recipe))
    for name, tensor in step.small().items():
        writer.write(name, 0, tensor)
    error = None
    for first, block, nbytes in _matrix_blocks(step, reader, whole):
        made, outliers = quantized_rows(block, linear, device)
        if error is None:
            error = relative_error(block, made, linear)
        for leaf, tensor in made.items():
            # Factors of low rank are no rows, and come whole.
            offset = 0 if whole else first * tensor[:1].numel() * tensor.element_size()
            writer.write(f"{step.prefix}.{leaf}", offset, tensor)
        if linear.columns:
            writer.write(step.outlier_weight, first * outliers.shape[1] * outliers.element_size(), outliers)
        progress(nbytes, "", None)
    progress(0, step.prefix, error)


def quantized_rows(
    block: Tensor, linear: PlannedLinear, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of some rows of a weight as the directory holds them, without padding, and its columns.

    Those are the weights of the calibrated outlier columns `[rows, n]`, in the weight's dtype.
    """
    recipe = linear.stored.scheme.recipe
    columns = list(linear.columns)
    if device.type == "cpu" and weight_rounding.serves(recipe, block.dtype):
        rounded = weight_rounding.round_rows(block, recipe)
        if rounded is not None:
            return {"weight_codes": rounded[0], "weight_scale": rounded[1]}, block[:, columns]
    statistics = linear.statistics.tensors if linear.statistics is not None else {}
    made = recipes.make(recipe, block.to(device), block.dtype, statistics)
    source = block
    if recipes.outliers_from_codes(recipe):
        kept = statistics.get(recipes.KEPT)
        source = made.outlier_columns(recipe.format, block.shape[1], kept).to(block.dtype).cpu()
    return {name: tensor.cpu().contiguous() for name, tensor in made.named().items()}, source[:, columns]


def relative_error(block: Tensor, made: dict[str, Tensor], linear: PlannedLinear) -> float:
    """How far a few rows are from what their codes stand for, outlier columns left out."""
    stored = linear.stored
    rows = min(ERROR_ROWS, block.shape[0])
    by_row = {name: tensor if name in ("left", "right") else tensor[:rows] for name, tensor in made.items()}
    exact = block[:rows].float()
    if "right" in by_row:
        by_row["right"] = by_row["right"][:, :rows]
    weight = QuantizedWeight.from_named(by_row).dequantized(stored.scheme.weight, stored.in_features)
    difference = weight - exact
    difference[:, list(linear.columns)] = 0
    return float(difference.norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny))
