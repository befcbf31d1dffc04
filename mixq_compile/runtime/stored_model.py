"""What a directory says and holds of a whole model."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from mixq_compile.checkpoints.schema import LeftAlone, StoredQuantization
from mixq_compile.runtime.compilation import LinearRecord, calibration_of, swapped_linears
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.stored_linear import describe, stored_tensors


def plain(name: str) -> str:
    """A name without the wrappers that `torch.compile` puts around parts of a model."""
    return name.replace("_orig_mod.", "")


def is_pretrained(module: nn.Module) -> bool:
    """True for transformers' own models: others may have methods of the same names."""
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def mixq_linears(model: nn.Module) -> dict[str, MixqLinear]:
    """The quantized linears of a model, under every name that they have."""
    return {
        plain(name): module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MixqLinear)
    }


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a directory: those of quantized linears, and all others that the model saves."""
    linears = mixq_linears(model)
    inside = tuple(f"{name}." for name in linears)
    found = {
        name: tensor
        for name, tensor in ((plain(key), value) for key, value in model.state_dict().items())
        if not name.startswith(inside)
    }
    seen: set[int] = set()
    for name, module in linears.items():
        again = id(module) in seen
        seen.add(id(module))
        for leaf, tensor in stored_tensors(module).items():
            # Files hold no memory twice, and whoever loads them makes two linears.
            found[f"{name}.{leaf}"] = tensor.clone() if again and not tensor.is_meta else tensor
    return found


def quantization_of(model: nn.Module) -> StoredQuantization:
    """What a directory says of a model, but for the digest and the hashes of its files."""
    left_alone = {
        plain(record.fqn): LeftAlone(
            record.role, record.out_features, record.in_features, record.skip or "", record.float_bytes
        )
        for record in swapped_linears(model)
        if record.scheme is None
    }
    return StoredQuantization(
        linears={name: describe(module) for name, module in mixq_linears(model).items()},
        left_alone=left_alone,
        calibration=calibration_of(model),
        dtype=_name(getattr(model, "dtype", torch.float32)),
        dtypes=_other_dtypes(model),
    )


def with_files(
    quantization: StoredQuantization, tensors: dict[str, object], files: dict[str, str]
) -> StoredQuantization:
    """The same with `count` and `digest` of the tensors, and the hash of each file."""
    return dataclasses.replace(quantization, tensors=tensors, files=files)


def _other_dtypes(model: nn.Module) -> dict[str, str]:
    """Parameters of another dtype than the model's, and buffers that are computed when the model is built."""
    usual = getattr(model, "dtype", torch.float32)
    saved = set(model.state_dict())
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, MixqLinear):
            continue
        for leaf, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.is_floating_point() and parameter.dtype != usual:
                found[plain(leaf)] = _name(parameter.dtype)
        for leaf, buffer in module.named_buffers(prefix, recurse=False):
            if leaf not in saved and buffer.is_floating_point():
                found[plain(leaf)] = _name(buffer.dtype)
    return found


def left_alone_records(quantization: StoredQuantization) -> list[LinearRecord]:
    """What reports say of the linears that a directory holds in 16 bit."""
    return [
        LinearRecord(
            fqn=name,
            role=entry.role,
            out_features=entry.out_features,
            in_features=entry.in_features,
            scheme=None,
            kernel=None,
            skip=entry.skip,
            outlier_weight_source=None,
            float_bytes=entry.float_bytes,
        )
        for name, entry in quantization.left_alone.items()
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
