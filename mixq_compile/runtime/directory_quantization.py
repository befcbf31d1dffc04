"""Quantizes a Hugging Face directory into another one, without loading its model."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from mixq_compile.checkpoints import directory as directories
from mixq_compile.checkpoints import file_plan
from mixq_compile.checkpoints.file_quantization import Progress, write_shards
from mixq_compile.checkpoints.journal import JOURNAL, UNFINISHED, Journal, sync_directory
from mixq_compile.checkpoints.model_card import model_card
from mixq_compile.errors import CheckpointError
from mixq_compile.runtime.directory_plan import DirectoryPlan
from mixq_compile.runtime.stored_model import with_files
from mixq_compile.version import __version__

SHARD_BYTES = 2_000_000_000
"""Most bytes of a file: what a killed run loses at most."""
_NOT_COPIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.index.json",
    directories.CONFIG, directories.CARD, ".*", "*.ckpt", "*.npz",
)  # fmt: skip
LARGEST_COPIED = 100 << 20
MARGIN_BYTES = 64 << 20
"""Of the disk, for config, tokenizer and journal."""


@dataclass(frozen=True)
class DirectorySizes:
    """What a quantized directory takes."""

    source_bytes: int
    output_bytes: int
    shards: int
    missing_bytes: int
    """What is still to be written."""
    free_bytes: int


class DirectoryQuantization:
    """One directory in the making: planned, begun or gone on with, finished."""

    def __init__(self, plan: DirectoryPlan, output: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.plan, self.output = plan, output
        self.shards = file_plan.shards(plan.steps, shard_bytes)

    def sizes(self) -> DirectorySizes:
        """What it takes on disk, and what is there."""
        there = self.output
        while not there.exists():
            there = there.parent
        done = sum(
            shard.nbytes
            for shard in self.shards
            if (path := self.output / shard.name).is_file() and path.stat().st_size == shard.nbytes
        )
        total = sum(shard.nbytes for shard in self.shards)
        free = shutil.disk_usage(there).free
        return DirectorySizes(self.plan.source_bytes, total, len(self.shards), total - done, free)

    def run(self, *, device: torch.device, progress: Progress, verify: bool = False) -> None:
        """Writes the directory, or goes on where an earlier run of the same options was stopped.

        Raises OptionError where it was begun with other options, CheckpointError where there is no room.
        """
        sizes = self.sizes()
        if sizes.missing_bytes + MARGIN_BYTES > sizes.free_bytes:
            raise CheckpointError(
                f"{self.output} needs {(sizes.missing_bytes + MARGIN_BYTES) / 1e9:.2f} GB more, and its disk "
                f"has {sizes.free_bytes / 1e9:.2f} GB free: make room, or give another --output."
            )
        self.output.mkdir(parents=True, exist_ok=True)
        journal = Journal.begin(self.output, self.making())
        write_shards(self.shards, self.output, journal, device=device, progress=progress, verify=verify)
        self._finish(journal)

    def making(self) -> dict[str, object]:
        """What decides every byte of the files."""
        return {
            "release": __version__,
            "plan": file_plan.plan_hash(self.shards),
            "source": file_plan.fingerprint(self.plan.files, self.plan.tensors),
        }

    def _finish(self, journal: Journal) -> None:
        """What readers look for, last: the index, then config.json."""
        for path in sorted(self.plan.source.iterdir()):
            wanted = path.is_file() and not any(path.match(pattern) for pattern in _NOT_COPIED)
            if wanted and path.stat().st_size <= LARGEST_COPIED:
                shutil.copyfile(path, self.output / path.name)
        tensors = directories.tensors_of(self.output / shard.name for shard in self.shards)
        facts: dict[str, object] = {"count": len(tensors), "digest": directories.digest(tensors)}
        hashes = {shard.name: journal.files[shard.name]["sha256"] for shard in self.shards}
        finished = with_files(self.plan.quantization, facts, hashes)
        nbytes = sum(entry.nbytes for entry in tensors.values())
        card = model_card(finished, self.plan.architecture, self.output.name, nbytes, self.plan.source_bytes)
        _write(self.output / directories.CARD, card)
        if len(self.shards) > 1:
            weight_map = {name: entry.path.name for name, entry in sorted(tensors.items())}
            index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
            _write(self.output / directories.INDEX, json.dumps(index, indent=2) + "\n")
        config = directories.with_config_hash({**self.plan.config, "quantization_config": finished.to_json()})
        _write(self.output / directories.CONFIG, json.dumps(config, indent=2) + "\n")
        journal.end()


def is_unfinished(directory: Path) -> bool:
    """True for a directory that a run began and did not finish."""
    return (directory / JOURNAL).is_file() and not (directory / directories.CONFIG).is_file()


def clear(directory: Path) -> None:
    """Takes from a directory what a run, finished or not, wrote to it; config.json first."""
    for pattern in (directories.CONFIG, JOURNAL, "mixq.json", directories.INDEX, directories.SINGLE,
                    directories.SHARDS, f"*{UNFINISHED}", directories.GENERATION):  # fmt: skip
        for path in directory.glob(pattern):
            path.unlink()


def _write(path: Path, text: str) -> None:
    """A file that is whole or not there."""
    temporary = path.with_name(path.name + UNFINISHED)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)
