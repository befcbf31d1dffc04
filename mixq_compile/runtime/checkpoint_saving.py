"""Writing quantized Hugging Face directories: config.json, mixq.json and one safetensors file."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.errors import CheckpointError
from mixq_compile.runtime.checkpoint_format import (
    CONFIG,
    GENERATION,
    MANIFEST,
    SCHEMA_VERSION,
    TENSORS,
    describe,
    describe_left_alone,
    dtype_name,
    quantization_config,
)
from mixq_compile.runtime.compilation import swapped_linears
from mixq_compile.runtime.mixq_linear import MixqLinear


def _plain(name: str) -> str:
    """A name without the wrappers that `torch.compile` puts around parts of a model."""
    return name.replace("_orig_mod.", "")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without second names of tied weights."""
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    tied = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, MixqLinear)
        for name in module._parameters
    }
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if name in tied and tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        kept[_plain(name)] = tensor.detach().cpu().contiguous().clone()
    return kept


def _computed_buffers(model: nn.Module) -> dict[str, str]:
    """The dtypes of buffers that are not saved, but computed when the model is built, such as frequencies."""
    saved = set(model.state_dict())
    names = {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        if not isinstance(module, MixqLinear)
        for name, buffer in module.named_buffers(recurse=False)
    }
    return {
        _plain(name): dtype_name(buffer)
        for name, buffer in names.items()
        if name not in saved and buffer.is_floating_point()
    }


def save_pretrained(model: nn.Module, directory: str | Path) -> Path:
    """Writes a transformers model that `quantize` swapped to a directory; returns it.

    Outlier columns known now are written too, so that a loaded model starts warm, and so are the
    16-bit weights that `keep_originals` kept. A directory is complete or has no config.json. Raises
    CheckpointError for a model without a config or without a MixqLinear, and where the directory
    cannot be written.
    """
    from safetensors import SafetensorError

    model = getattr(model, "_orig_mod", model)
    swapped = {
        _plain(name): module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MixqLinear)
    }
    if not swapped:
        raise CheckpointError(
            "the model has no MixqLinear to save: call mixq_compile.quantize(model) first, or use "
            "model.save_pretrained for a 16-bit model."
        )
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        raise CheckpointError(
            f"a {type(model).__name__} has no transformers config: save its state_dict() with torch.save."
        )
    target = Path(directory)
    existed = target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".mixq-", dir=target) as unfinished:
            _write(model, swapped, Path(unfinished))
            _put_in_place(Path(unfinished), target)
    except BaseException as error:
        if not existed:
            shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(
                f"{target} cannot be written ({error}): see to disk space and rights."
            ) from error
        raise
    return target


def _write(model: nn.Module, swapped: dict[str, MixqLinear], folder: Path) -> None:
    from safetensors.torch import save_file

    left_alone = {_plain(r.fqn): r for r in swapped_linears(model) if r.scheme is None}
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.quantization_config = quantization_config(swapped, left_alone)
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "architecture": type(model).__name__,
        "dtype": str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
        "linears": {name: describe(module) for name, module in swapped.items()},
        "left_alone": {name: describe_left_alone(record) for name, record in left_alone.items()},
        "computed": _computed_buffers(model),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    save_file(_tensors(model), folder / TENSORS, metadata={"format": "pt"})


def _put_in_place(unfinished: Path, target: Path) -> None:
    """Moves complete files to where readers look; what tells them that all is there comes last."""
    for name in (CONFIG, MANIFEST, GENERATION):
        (target / name).unlink(missing_ok=True)
    last = (MANIFEST, CONFIG)
    for path in sorted(
        unfinished.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1
    ):
        os.replace(path, target / path.name)
