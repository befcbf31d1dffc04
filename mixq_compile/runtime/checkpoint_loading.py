"""`mixq.load_pretrained`: transformers' `from_pretrained`, with the checks that it leaves out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixq_compile.checkpoints import directory as directories
from mixq_compile.checkpoints.schema import StoredQuantization
from mixq_compile.errors import CheckpointError
from mixq_compile.runtime.old_directories import MANIFEST, load_old
from mixq_compile.runtime.transformers_registration import register


def load_pretrained(
    directory: str | Path,
    device: str | torch.device = "cpu",
    *,
    dtype: str | torch.dtype = "auto",
    verify: bool = False,
) -> nn.Module:
    """Loads a quantized directory; the model is in evaluation mode.

    Args:
        directory: what `save_pretrained` or `mixq quantize` wrote.
        device: where the model goes.
        dtype: of everything that is no code, scale or state; "auto": as it was written.
        verify: reads every file once more, and compares its hash with the one that was written.

    Raises CheckpointError where a file is missing, corrupt, or does not fit the others.
    """
    source = Path(directory)
    if (source / MANIFEST).is_file() and not _is_new(source):
        warnings.warn(
            f"{source} was written by an older release (it has a {MANIFEST}): write it again with "
            "mixq_compile.save_pretrained, so that transformers reads it too.",
            stacklevel=2,
        )
        return load_old(source, device)
    config, _ = checked(source, verify=verify)
    import transformers

    names = config.get("architectures") or [None]
    architecture = getattr(transformers, str(names[0]), None)
    if architecture is None or not hasattr(architecture, "from_pretrained"):
        raise CheckpointError(
            f"this transformers ({transformers.__version__}) has no {names[0]!r}, which {source} was written "
            "from: install a newer one."
        )
    register()
    try:
        model: nn.Module = architecture.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = next(iter(str(error).strip().splitlines()), "")
        raise CheckpointError(
            f"{source} cannot be loaded ({type(error).__name__}: {reason}): its config.json or weights are "
            "corrupt. Quantize the model again."
        ) from error
    return model.to(device)


def checked(source: Path, *, verify: bool = False) -> tuple[dict[str, Any], StoredQuantization]:
    """The config of a quantized directory, and its quantization, after its files were looked at.

    Raises CheckpointError where they are not what was written; with `verify`, in any byte.
    """
    path = source / directories.CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{source} holds no {directories.CONFIG}: it is no quantized directory, or one whose writing was "
            "interrupted. Quantize the model first (mixq quantize MODEL --output DIR); the same command goes "
            "on where it stopped."
        )
    config = directories.read_json(path)
    entry = config.get("quantization_config")
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"{path} has no quantization_config: the model is not quantized. Load it with transformers, and "
            "call mixq_compile.quantize(model)."
        )
    quantization = StoredQuantization.from_json(entry, str(path))
    tensors = directories.checked_tensors(source)
    expected = quantization.tensors
    if (len(tensors), directories.digest(tensors)) != (expected["count"], expected["digest"]):
        raise CheckpointError(
            f"the files in {source} do not hold the tensors that {path} was written for: {len(tensors)} in "
            f"place of {expected['count']}, or others. Quantize the model again."
        )
    if verify:
        verify_hashes(source, config, quantization)
    return config, quantization


def verify_hashes(source: Path, config: dict[str, Any], quantization: StoredQuantization) -> None:
    """Reads every file of a directory. Raises CheckpointError for one whose bytes were changed."""
    if directories.CONFIG not in quantization.files:
        raise CheckpointError(
            f"{source / directories.CONFIG} lacks its hash: it is damaged or was written by hand."
        )
    for name, expected in quantization.files.items():
        if Path(name).name != name:
            raise CheckpointError(f"{source / directories.CONFIG} is corrupt: {name!r} is no file beside it.")
        is_config = name == directories.CONFIG
        found = directories.config_hash(config) if is_config else directories.file_hash(source / name)
        if found != expected:
            raise CheckpointError(
                f"{source / name} has other bytes than were written: copy or quantize it again."
            )


def _is_new(source: Path) -> bool:
    """True where a directory was written again since: config.json says so."""
    try:
        entry = directories.read_json(source / directories.CONFIG).get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(entry, dict) and "modules" in entry
