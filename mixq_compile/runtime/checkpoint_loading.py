"""Reading the directories that `checkpoint_saving` writes, and those of the first schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixq_compile.errors import CheckpointError
from mixq_compile.runtime.checkpoint_format import (
    CONFIG,
    GENERATION,
    MANIFEST,
    TENSORS,
    corrupt,
    empty_linear,
    read_manifest,
    record_left_alone,
)
from mixq_compile.runtime.compilation import remember_swap
from mixq_compile.runtime.saving_methods import take_over_saving
from mixq_compile.runtime.swap_record import swap_record


def _empty_model(source: Path, manifest: dict[str, Any]) -> nn.Module:
    """The model of a directory's config, in the manifest's dtype."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise corrupt(source / CONFIG, error) from error
    # It tells other readers what to do; the model's own config has none, as before saving.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    architecture = getattr(transformers, manifest["architecture"], None)
    if architecture is None:
        raise CheckpointError(f"this transformers has no {manifest['architecture']!r}: install a newer one.")
    model: nn.Module = architecture._from_config(config, dtype=getattr(torch, manifest["dtype"]))
    if (source / GENERATION).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(source)  # type: ignore[assignment]
    return model


def load_pretrained(directory: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Loads a directory that `save_pretrained` wrote; the model is in evaluation mode.

    Raises CheckpointError where a file is missing, corrupt, or does not fit the others.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = Path(directory)
    manifest = read_manifest(source)
    records = []
    try:
        model = _empty_model(source, manifest)
        for name, entry in manifest["linears"].items():
            module = empty_linear(entry)
            module.fqn = name
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
            records.append(swap_record(name, module))
        records += [record_left_alone(name, entry) for name, entry in manifest.get("left_alone", {}).items()]
        for name, dtype in manifest["computed"].items():
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, leaf, getattr(owner, leaf).to(getattr(torch, dtype)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise corrupt(source / MANIFEST, error) from error
    try:
        tensors = load_file(source / TENSORS)
        for name, tensor in model.state_dict(keep_vars=True).items():
            # Some models keep a few tensors in another dtype than the rest.
            if name in tensors and tensors[name].dtype != tensor.dtype:
                tensor.data = tensor.to(tensors[name].dtype)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise corrupt(source / TENSORS, error) from error
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise _misfit(source / TENSORS, str(error).partition("\n")[2].strip()) from error
    _check_complete(model, source / TENSORS, missing, unexpected)
    remember_swap(model, records)
    take_over_saving(model)
    return model.eval().to(device)


def _check_complete(model: nn.Module, path: Path, missing: list[str], unexpected: list[str]) -> None:
    """Ties what the model ties. Raises CheckpointError where tensors are missing or left over."""
    model.tie_weights()  # type: ignore[operator]
    first_names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first_names
    wrong = [*unexpected, *(name for name in missing if name not in tied)]
    if wrong:
        raise _misfit(path, ", ".join(wrong[:5]))


def _misfit(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} does not fit the files beside it: {what}. Quantize the model again.")
