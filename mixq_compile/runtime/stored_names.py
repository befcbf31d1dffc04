"""What ties the files of a quantized directory to a model that transformers has built, and its checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mixq_compile.checkpoints import directory
from mixq_compile.checkpoints.safetensors_files import TensorEntry
from mixq_compile.checkpoints.schema import TRIPWIRE, StoredLinear, StoredQuantization
from mixq_compile.errors import CheckpointError
from mixq_compile.ir.linears import is_conv1d
from mixq_compile.runtime.swap_obstacles import replace_in_containers


def check_tensors(files: list[Path], quantization: StoredQuantization) -> dict[str, TensorEntry]:
    """The tensors of these files. Raises CheckpointError where they are not those that were written."""
    found = directory.tensors_of(files)
    expected = quantization.tensors
    if (len(found), directory.digest(found)) != (expected["count"], expected["digest"]):
        raise CheckpointError(
            f"the files in {files[0].parent} do not hold the tensors that config.json was written for: "
            f"{len(found)} in place of {expected['count']}, or others. A shard is missing or of another "
            "model: download or quantize again."
        )
    return found


def check_fits(ordinary: nn.Module, name: str, entry: StoredLinear) -> None:
    """Raises CheckpointError where a model's linear is not the one that an entry describes."""
    weight = getattr(ordinary, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
    wanted: tuple[int, ...] = (entry.out_features, entry.in_features)
    if entry.transposed:
        wanted = wanted[::-1]
    has_bias = getattr(ordinary, "bias", None) is not None
    if shape != wanted or has_bias != entry.bias or is_conv1d(ordinary) != entry.transposed:
        raise CheckpointError(
            f"the model's {name!r} is a {type(ordinary).__name__} of {shape}"
            f"{' with' if has_bias else ' without'} bias, and the directory's of {wanted}"
            f"{' with' if entry.bias else ' without'}: config.json does not belong to the files. Quantize "
            "the model again."
        )


def names_in(
    modules: Mapping[str, nn.Module], prefix: str, stored: Mapping[str, StoredLinear | None]
) -> dict[str, str]:
    """By the names that a model has: what a directory of a larger or smaller model calls its linears."""
    found = {}
    for name in stored:
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if candidate in modules:
                found[candidate] = name
                break
    return found


def prefixes(
    model: Any, tensors: Mapping[str, TensorEntry], conversions: Any, names: Mapping[str, str]
) -> dict[str, str]:
    """By the names that a model has: what the files call its quantized linears, told by their codes.

    Raises CheckpointError where a tensor does not fit the model.
    """
    # Not before transformers is loaded completely.
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    modules = dict(model.named_modules())
    leaf = ".weight_codes"
    found = {}
    for key, entry in tensors.items():
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and key in state:
            renamed, pattern = key, None
        name = renamed.removesuffix(leaf)
        if renamed.endswith(leaf):
            if name in names:
                found[name] = key.removesuffix(leaf)
            elif names_in(modules, model.base_model_prefix, {name: None}):
                raise CheckpointError(
                    f"the files hold codes of {name!r}, and config.json does not say that it is quantized: "
                    "they do not belong together. Quantize the model again."
                )
        elif f"{key.removesuffix('.' + TRIPWIRE)}{leaf}" in tensors:
            continue
        elif pattern is None and renamed in state and state[renamed].shape != entry.shape:
            # Some releases of transformers take any shape where a model is quantized.
            raise CheckpointError(
                f"{key!r} has shape {list(entry.shape)} in {entry.path}, and the model that config.json "
                f"describes {list(state[renamed].shape)}: they do not belong together."
            )
    return found


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in another's place, under every name that it has."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new
    replace_in_containers(model, old, new)


def check_linear(
    name: str, prefix: str | None, entry: StoredLinear, tensors: Mapping[str, TensorEntry]
) -> None:
    """Raises CheckpointError where the files lack a tensor of a linear; `prefix` is what they call it."""
    if prefix is None:
        raise CheckpointError(
            f"the files hold no codes of {name!r}, which config.json says is quantized: a shard is "
            "missing or of another model. Quantize the model again."
        )
    for leaf, (dtype, shape) in entry.tensors().items():
        found = tensors.get(f"{prefix}.{leaf}")
        # A bias is cast to the model's dtype, whichever it has in the file.
        fits = found is not None and found.shape == shape and (leaf == "bias" or found.dtype == dtype)
        if not fits:
            has = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
            raise CheckpointError(
                f"{prefix}.{leaf} {has} in the files, and config.json says {dtype} {list(shape)}: they do "
                "not belong together. Quantize the model again."
            )
