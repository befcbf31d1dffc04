"""`release_weights`: frees 16-bit weights after packing, and makes what needs them say so."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.errors import ReleasedWeightError
from mixq_compile.runtime.weight_store import STORE

_ADVICE = (
    "its 16-bit weight was freed by options={'release_weights': True}. Load the model again without that "
    "option, or use mixq_compile.quantize(model), whose result can be run, saved and loaded."
)


def owners_of(weights: Iterable[Tensor]) -> dict[int, list[tuple[nn.Module, str]]]:
    """For each weight (by id) the modules that hold it, with the attribute's name.

    A backend is given parameters without their modules, so the live modules are searched.
    """
    wanted = {id(weight) for weight in weights}
    found: dict[int, list[tuple[nn.Module, str]]] = {key: [] for key in wanted}
    for candidate in gc.get_objects():
        if isinstance(candidate, nn.Module):
            for name, parameter in candidate.__dict__.get("_parameters", {}).items():
                if id(parameter) in wanted:
                    found[id(parameter)].append((candidate, name))
    return found


def _refuse_forward(module: nn.Module, arguments: Any) -> None:
    if torch.compiler.is_compiling():
        return
    raise ReleasedWeightError(f"a {type(module).__name__} cannot run uncompiled: {_ADVICE}")


def _refuse_state(module: nn.Module, *arguments: Any) -> None:
    raise ReleasedWeightError(f"the state of a {type(module).__name__} cannot be read or loaded: {_ADVICE}")


def release(weights: Iterable[Tensor]) -> list[Tensor]:
    """Frees the storage of packed weights that one module alone holds; returns those freed.

    Running, saving or loading their modules uncompiled raises ReleasedWeightError from then on.
    """
    candidates = [weight for weight in weights if weight.untyped_storage().nbytes() > 0]
    owners = owners_of(candidates)
    freed = []
    for weight in candidates:
        holders = owners[id(weight)]
        if len(holders) != 1:
            continue
        module, _ = holders[0]
        for packed in STORE.packed(weight):
            packed.released = True
        weight.untyped_storage().resize_(0)
        module.register_forward_pre_hook(_refuse_forward)
        module.register_state_dict_pre_hook(_refuse_state)
        module.register_load_state_dict_pre_hook(_refuse_state)
        freed.append(weight)
    return freed
