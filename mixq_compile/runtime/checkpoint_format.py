"""What `mixq.json` and the `quantization_config` of a quantized directory say: written and read here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixq_compile.errors import CheckpointError
from mixq_compile.runtime.compilation import LinearRecord
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.scheme import QuantScheme

SCHEMA_VERSION = 2
READABLE = (1, 2)
"""Versions that this release reads. 1 has neither tripwires nor originals nor linears left alone."""
MANIFEST = "mixq.json"
CONFIG = "config.json"
TENSORS = "model.safetensors"
GENERATION = "generation_config.json"
QUANT_METHOD = "mixq"


def describe(module: MixqLinear) -> dict[str, Any]:
    """The manifest's entry of one quantized linear."""
    return {
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
        "dtype": dtype_name(module.weight_marker),
        "scheme": module.scheme.to_json(),
        "batch_invariant": module.batch_invariant,
        "calibrated": module.calibrated,
        "original": module.outlier_source.numel() > 0,
    }


def empty_linear(entry: Mapping[str, Any]) -> MixqLinear:
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


def describe_left_alone(record: LinearRecord) -> dict[str, Any]:
    """The manifest's entry of a linear that was not quantized."""
    fields = ("role", "out_features", "in_features", "skip", "float_bytes")
    return {name: getattr(record, name) for name in fields}


def record_left_alone(name: str, entry: Mapping[str, Any]) -> LinearRecord:
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


def dtype_name(tensor: Tensor) -> str:
    """The name of a tensor's dtype as manifests have it, such as `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")


def quantization_config(linears: Mapping[str, MixqLinear], left_alone: Iterable[str]) -> dict[str, Any]:
    """What `config.json` says to other readers: that the weights are not those of an ordinary model."""
    schemes = {name: module.scheme.name for name, module in linears.items()}
    (usual, _), *_ = Counter(schemes.values()).most_common(1)
    return {
        "quant_method": QUANT_METHOD,
        "schema_version": SCHEMA_VERSION,
        "scheme": usual,
        "layers": {name: scheme for name, scheme in schemes.items() if scheme != usual},
        "modules_to_not_convert": sorted(left_alone),
    }


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory. Raises CheckpointError where there is none that this release reads."""
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds no {MANIFEST}: mixq_compile.save_pretrained did not write it, or was "
            "interrupted. Quantize the model first: mixq quantize MODEL --output DIR."
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise corrupt(path, error) from error
    if version not in READABLE:
        raise CheckpointError(
            f"{path} has schema version {version}, and this release reads "
            f"{' and '.join(map(str, READABLE))}: quantize again."
        )
    return manifest


def corrupt(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that cannot be read."""
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
    return CheckpointError(f"{path} is corrupt ({reason}): quantize the model again.")
