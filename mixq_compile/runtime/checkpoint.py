"""Quantized Hugging Face directories: config.json, mixq.json and one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.errors import CheckpointError
from mixq_compile.ir.roles import role_of
from mixq_compile.runtime.compilation import LinearRecord, remember_swap
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.scheme import QuantScheme

SCHEMA_VERSION = 1
MANIFEST = "mixq.json"
TENSORS = "model.safetensors"
GENERATION = "generation_config.json"


def _describe(module: MixqLinear) -> dict[str, Any]:
    return {
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
        "dtype": _dtype_name(module.weight_marker),
        "scheme": module.scheme.to_json(),
        "batch_invariant": module.batch_invariant,
        "calibrated": module.calibrated,
    }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without second names of tied weights."""
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if name in parameters and tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        kept[name] = tensor.detach().cpu().contiguous().clone()
    return kept


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _computed_buffers(model: nn.Module) -> dict[str, str]:
    """The dtypes of buffers that are not saved, but computed when the model is built, such as frequencies."""
    saved = set(model.state_dict())
    return {
        f"{prefix}.{name}" if prefix else name: _dtype_name(buffer)
        for prefix, module in model.named_modules()
        if not isinstance(module, MixqLinear)
        for name, buffer in module.named_buffers(recurse=False)
        if f"{prefix}.{name}" not in saved and buffer.is_floating_point()
    }


def save_pretrained(model: nn.Module, directory: str | Path) -> Path:
    """Writes a transformers model that `quantize` swapped to a directory; returns it.

    Outlier columns known now are written too, so that a loaded model starts warm. Raises
    CheckpointError for a model without a config or without a MixqLinear.
    """
    from safetensors.torch import save_file

    swapped = {
        name: module
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
    target.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(target)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "architecture": type(model).__name__,
        "dtype": str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
        "linears": {name: _describe(module) for name, module in swapped.items()},
        "computed": _computed_buffers(model),
    }
    save_file(_tensors(model), target / TENSORS, metadata={"format": "pt"})
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return target


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds no {MANIFEST}: mixq_compile.save_pretrained did not write it. "
            "Quantize the model first: mixq quantize MODEL --output DIR."
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(path, error) from error
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version}, and this release reads {SCHEMA_VERSION}: quantize again."
        )
    return manifest


def _corrupt(path: Path, error: Exception) -> CheckpointError:
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
    return CheckpointError(f"{path} is corrupt ({reason}): quantize the model again.")


def _empty_linear(entry: dict[str, Any]) -> MixqLinear:
    """The MixqLinear that a manifest describes, still without weights."""
    module = MixqLinear(
        entry["in_features"],
        entry["out_features"],
        QuantScheme.from_json(entry["scheme"]),
        bias=entry["bias"],
        dtype=getattr(torch, entry["dtype"]),
        batch_invariant=entry["batch_invariant"],
    )
    module.calibrated = tuple((int(column), float(value)) for column, value in entry["calibrated"])
    return module


def _record(name: str, module: MixqLinear) -> LinearRecord:
    return LinearRecord(
        fqn=name,
        role=role_of(name),
        out_features=module.out_features,
        in_features=module.in_features,
        scheme=module.scheme.name,
        kernel=None,
        skip=None,
        outlier_source=module.outlier_weight_source,
        float_bytes=module.out_features * module.in_features * module.weight_marker.element_size(),
    )


def _empty_model(source: Path, manifest: dict[str, Any]) -> nn.Module:
    """The model of a directory's config, in the manifest's dtype."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _corrupt(source / "config.json", error) from error
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
    manifest = _read_manifest(source)
    records = []
    try:
        model = _empty_model(source, manifest)
        for name, entry in manifest["linears"].items():
            module = _empty_linear(entry)
            module.fqn = name
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
            records.append(_record(name, module))
        for name, dtype in manifest["computed"].items():
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, leaf, getattr(owner, leaf).to(getattr(torch, dtype)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _corrupt(source / MANIFEST, error) from error
    try:
        tensors = load_file(source / TENSORS)
        for name, tensor in model.state_dict().items():
            # Some models keep a few tensors in another dtype than the rest.
            if name in tensors and tensors[name].dtype != tensor.dtype:
                _own_tensor(model, name).data = tensor.to(tensors[name].dtype)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _corrupt(source / TENSORS, error) from error
    _check_complete(model, source / TENSORS, missing, unexpected)
    remember_swap(model, records)
    return model.eval().to(device)


def _own_tensor(model: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(parent), leaf)
    return found


def _check_complete(model: nn.Module, path: Path, missing: list[str], unexpected: list[str]) -> None:
    """Ties what the model ties. Raises CheckpointError where tensors are missing or left over."""
    model.tie_weights()  # type: ignore[operator]
    first_names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first_names
    wrong = [*unexpected, *(name for name in missing if name not in tied)]
    if wrong:
        raise CheckpointError(
            f"{path} does not fit the files beside it: {', '.join(wrong[:5])}. Quantize the model again."
        )
