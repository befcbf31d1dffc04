"""Writing quantized models as ordinary Hugging Face directories."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from mixq_compile.checkpoints import directory as directories
from mixq_compile.checkpoints.model_card import MARK, model_card
from mixq_compile.checkpoints.schema import StoredQuantization
from mixq_compile.errors import CheckpointError
from mixq_compile.runtime.stored_model import is_pretrained, mixq_linears, quantization_of, with_files

OLD_MANIFEST = "mixq.json"
SHARD_SIZE = "5GB"
_WEIGHTS = (directories.SINGLE, directories.INDEX, directories.SHARDS, "pytorch_model*.bin*")
"""What earlier models left in a directory, which readers would take for the new one's."""


def save_pretrained(
    model: nn.Module, directory: str | Path, *, max_shard_size: int | str = SHARD_SIZE
) -> Path:
    """Writes a transformers model that `quantize` swapped to a directory; returns it.

    Outlier columns known now are written too, so that a loaded model starts warm, and so are the
    16-bit weights that `keep_originals` kept. A SentenceTransformer is written by its own method, with its
    transformer quantized. A directory is complete or has no config.json.

    Args:
        model: the model, or what `torch.compile` made of it.
        directory: made where it is not there.
        max_shard_size: most bytes of one file, such as "2GB".

    Raises CheckpointError for a model without a config or without a MixqLinear, and where the directory
    cannot be written.
    """
    from safetensors import SafetensorError

    model = getattr(model, "_orig_mod", model)
    if not mixq_linears(model):
        raise CheckpointError(
            "the model has no MixqLinear to save: call mixq_compile.quantize(model) first, or use "
            "model.save_pretrained for a 16-bit model."
        )
    target = Path(directory)
    if any(base.__name__ == "SentenceTransformer" for base in type(model).__mro__):
        model.save_pretrained(str(target))  # type: ignore[operator]
        return target
    if not is_pretrained(model):
        inner = [name for name, module in model.named_modules() if name and is_pretrained(module)]
        hint = f" Save its part {inner[0]!r} by itself, or" if inner else " Instead,"
        raise CheckpointError(
            f"a {type(model).__name__} is no transformers model with a config, so nothing would build it "
            f"again.{hint} save its state_dict() with torch.save."
        )
    existed = target.is_dir()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".mixq-", dir=target) as unfinished:
            _write(model, Path(unfinished), target.name, max_shard_size)
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


def _write(model: Any, folder: Path, name: str, max_shard_size: int | str) -> None:
    quantization = quantization_of(model)
    with _prepared(model, quantization):
        _write_shards(model, folder, max_shard_size, original_names=True)
        if not _all_found(folder, quantization):
            # Some models merge or split tensors where they are loaded, and not all releases of
            # transformers do so with other names than the 16-bit weight's.
            for path in folder.glob("*.safetensors*"):
                path.unlink()
            _write_shards(model, folder, max_shard_size, original_names=False)
    tensors = directories.checked_tensors(folder)
    if not _all_found(folder, quantization):
        raise CheckpointError(
            f"transformers renames tensors of a {type(model).__name__} in a way that quantized ones do not "
            "survive: save its state_dict() with torch.save."
        )
    hashes = {path.name: directories.file_hash(path) for path in directories.tensor_files(folder)}
    facts = {"count": len(tensors), "digest": directories.digest(tensors)}
    finished = with_files(quantization, facts, hashes)
    path = folder / directories.CONFIG
    config = directories.read_json(path)
    config["quantization_config"] = finished.to_json()
    text = json.dumps(directories.with_config_hash(config), indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
    nbytes = sum(entry.nbytes for entry in tensors.values())
    card = model_card(finished, type(model).__name__, name, nbytes, original_bytes(finished, nbytes))
    (folder / directories.CARD).write_text(card, encoding="utf-8")


def original_bytes(quantization: StoredQuantization, nbytes: int) -> int:
    """The bytes of the tensors of a directory before they were quantized, from those after it."""
    for linear in quantization.linears.values():
        itemsize = 4 if linear.dtype == "float32" else 2
        nbytes += linear.out_features * linear.in_features * itemsize
        for leaf, (dtype, shape) in linear.tensors().items():
            if leaf != "bias":
                elements = 1
                for size in shape:
                    elements *= size
                nbytes -= elements * directories.item_size(dtype)
    return nbytes


@contextlib.contextmanager
def _prepared(model: Any, quantization: StoredQuantization) -> Iterator[None]:
    """Gives a model what transformers' `save_pretrained` asks for, and takes it away again."""
    from mixq_compile.runtime.transformers_config import MixqConfig
    from mixq_compile.runtime.transformers_saving import StateWriter

    before = {name: model.__dict__.get(name) for name in ("config", "hf_quantizer")}
    without_generation = model.can_generate() and getattr(model, "generation_config", None) is None
    if without_generation:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig()
    configuration = MixqConfig.of(quantization)
    model.config = copy.deepcopy(model.config)
    model.config.quantization_config = configuration
    model.hf_quantizer = StateWriter(configuration, pre_quantized=True)
    try:
        yield
    finally:
        if without_generation:
            model.generation_config = None
        for name, value in before.items():
            if value is None:
                delattr(model, name)
            else:
                setattr(model, name, value)


def _write_shards(model: Any, folder: Path, max_shard_size: int | str, *, original_names: bool) -> None:
    type(model).save_pretrained(
        model, folder, max_shard_size=max_shard_size, save_original_format=original_names
    )


def _all_found(folder: Path, quantization: StoredQuantization) -> bool:
    """True where each quantized linear has all its tensors under one name, whichever that is."""
    tensors = directories.checked_tensors(folder)
    found = [key.removesuffix(".weight_codes") for key in tensors if key.endswith(".weight_codes")]
    if len(found) != len(quantization.linears):
        return False
    for name in found:
        entry = quantization.linears.get(name)
        leaves = entry.tensors() if entry is not None else {"weight_codes": None, "weight_scale": None}
        if any(f"{name}.{leaf}" not in tensors for leaf in leaves):
            return False
    return True


def _put_in_place(unfinished: Path, target: Path) -> None:
    """Moves complete files to where readers look; what tells them that all is there comes last."""
    first = (directories.CONFIG, OLD_MANIFEST, directories.GENERATION)
    for name in first:
        (target / name).unlink(missing_ok=True)
    for pattern in _WEIGHTS:
        for path in target.glob(pattern):
            path.unlink()
    card = target / directories.CARD
    if card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        (unfinished / directories.CARD).unlink()
    last = (directories.INDEX, directories.CONFIG)
    for path in sorted(
        unfinished.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1
    ):
        os.replace(path, target / path.name)
