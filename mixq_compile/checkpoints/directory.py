"""The tensors of a Hugging Face directory: which file holds each, and a digest of them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mixq_compile.checkpoints.safetensors_files import DTYPES, TensorEntry, read_header
from mixq_compile.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
CARD = "README.md"
SHARDS = "model-*-of-*.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{path} is corrupt ({first_line}): write the directory again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is corrupt: it holds a {type(found).__name__}, no object.")
    return found


def tensor_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: one, or the shards that its index names.

    Raises CheckpointError where there are none, or one of an index is missing.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(
            f"{directory} holds neither {SINGLE} nor {INDEX}: its weights were not written in safetensors "
            "files, or not completely."
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in names.values()
    ):
        raise CheckpointError(f"{index} is corrupt: it has no weight_map from tensors to files beside it.")
    return [directory / name for name in sorted(set(names.values()))]


def tensors_of(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """All tensors of some files, file by file. Raises CheckpointError for a name in two files."""
    found: dict[str, TensorEntry] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if name in found:
                raise CheckpointError(
                    f"{name!r} is both in {found[name].path} and in {path}: write them again."
                )
            found[name] = entry
    return found


def checked_tensors(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of a directory, which are those of its index. Raises CheckpointError where they differ."""
    files = tensor_files(directory)
    found = tensors_of(files)
    if files != [directory / SINGLE]:
        listed = read_json(directory / INDEX)["weight_map"]
        held = {name: entry.path.name for name, entry in found.items()}
        wrong = sorted(
            name for name in {*listed, *held} if listed.get(name) != held.get(name)
        )  # fmt: skip
        if wrong:
            raise CheckpointError(
                f"{directory / INDEX} does not fit the files beside it: {', '.join(wrong[:5])}"
                f"{' and others' if len(wrong) > 5 else ''}. Download or write them again."
            )
    return found


def digest(tensors: Mapping[str, TensorEntry]) -> str:
    """A hash of names, dtypes and shapes, whichever files hold the tensors."""
    lines = sorted(f"{entry.name}\t{entry.dtype}\t{list(entry.shape)}\n" for entry in tensors.values())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes. Raises CheckpointError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error


def config_hash(config: Mapping[str, Any]) -> str:
    """The SHA-256 of what a config.json says, but for the hashes in it."""
    entry = {name: value for name, value in config["quantization_config"].items() if name != "files"}
    text = json.dumps({**config, "quantization_config": entry}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def with_config_hash(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config.json with its own hash among those of the files."""
    read = json.loads(json.dumps(config))
    read["quantization_config"]["files"][CONFIG] = config_hash(read)
    return dict(read)


def item_size(dtype: str) -> int:
    """Bytes of one element of a dtype that headers name."""
    return DTYPES[dtype].itemsize
