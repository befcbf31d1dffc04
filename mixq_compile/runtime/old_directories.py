"""Reading the directories of older releases, which had a `mixq.json`; nothing writes them any more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixq_compile.errors import CheckpointError
from mixq_compile.runtime.compilation import LinearRecord, remember_swap
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.saving_methods import take_over_saving
from mixq_compile.runtime.swap_record import swap_record
from mixq_compile.scheme import QuantScheme

READABLE = (1, 2)
"""Versions that this release reads. 1 has neither tripwires nor originals nor linears left alone."""
MANIFEST = "mixq.json"
CONFIG = "config.json"
TENSORS = "model.safetensors"
GENERATION = "generation_config.json"


def _empty_model(source: Path, manifest: dict[str, Any]) -> nn.Module:
    """The model of a directory's config, in the manifest's dtype."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _corrupt(source / CONFIG, error) from error
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


def load_old(source: Path, device: str | torch.device) -> nn.Module:
    """Loads a directory of the schemas 1 and 2; the model is in evaluation mode.

    Raises CheckpointError where a file is missing, corrupt, or does not fit the others.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = _read_manifest(source)
    records = []
    try:
        model = _empty_model(source, manifest)
        for name, entry in manifest["linears"].items():
            module = _empty_linear(entry)
            module.fqn = name
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
            records.append(swap_record(name, module))
        records += [_record_left_alone(name, entry) for name, entry in manifest.get("left_alone", {}).items()]
        for name, dtype in manifest["computed"].items():
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, leaf, getattr(owner, leaf).to(getattr(torch, dtype)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _corrupt(source / MANIFEST, error) from error
    try:
        tensors = load_file(source / TENSORS)
        for name, tensor in model.state_dict(keep_vars=True).items():
            # Some models keep a few tensors in another dtype than the rest.
            if name in tensors and tensors[name].dtype != tensor.dtype:
                tensor.data = tensor.to(tensors[name].dtype)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _corrupt(source / TENSORS, error) from error
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


def _empty_linear(entry: Mapping[str, Any]) -> MixqLinear:
    """The MixqLinear that a manifest describes, still without weights."""
    dtype = getattr(torch, entry["dtype"])
    module = MixqLinear(
        entry["in_features"],
        entry["out_features"],
        QuantScheme.from_json(entry["scheme"]),
        bias=entry["bias"],
        dtype=dtype,
        batch_invariant=entry["batch_invariant"],
    )
    module.calibrated = tuple((int(column), float(value)) for column, value in entry["calibrated"])
    if entry.get("original", False):
        module.keep_original(torch.empty(module.out_features, module.in_features, dtype=dtype, device="cpu"))
    return module


def _record_left_alone(name: str, entry: Mapping[str, Any]) -> LinearRecord:
    """What reports say of a linear that was not quantized."""
    return LinearRecord(
        fqn=name,
        role=entry["role"],
        out_features=entry["out_features"],
        in_features=entry["in_features"],
        scheme=None,
        kernel=None,
        skip=entry["skip"],
        outlier_weight_source=None,
        float_bytes=entry["float_bytes"],
    )


def _read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory. Raises CheckpointError where there is none that this release reads."""
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(path, error) from error
    if version not in READABLE:
        raise CheckpointError(
            f"{path} has schema version {version}, and this release reads "
            f"{' and '.join(map(str, READABLE))}: quantize again."
        )
    return manifest


def _corrupt(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that cannot be read."""
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
    return CheckpointError(f"{path} is corrupt ({reason}): quantize the model again.")
