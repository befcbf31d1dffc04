"""`release_weights`: frees 16-bit weights after packing, and makes what needs them say so."""

from __future__ import annotations

import functools
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
        # isinstance would ask a weak proxy for its class, and fail where its object has died.
        if issubclass(type(candidate), nn.Module):
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


_READERS = {
    "_apply": "moved or cast",
    "__deepcopy__": "copied",
    "__getstate__": "pickled",
}
"""Methods of a module that read its parameters' storage, and what they do."""


def _refuse(kind: str, action: str, *arguments: Any, **named: Any) -> None:
    raise ReleasedWeightError(f"a {kind} cannot be {action}: {_ADVICE}")


def release(weights: Iterable[Tensor]) -> list[Tensor]:
    """Frees the storage of packed weights that one module alone holds; returns those freed.

    Running, saving, loading, moving or copying their modules raises ReleasedWeightError from then on.
    """
    candidates = [weight for weight in weights if not STORE.is_released(weight)]
    owners = owners_of(candidates)
    freed = []
    for weight in candidates:
        holders = owners[id(weight)]
        if len(holders) != 1:
            continue
        ((module, _),) = holders
        STORE.release(weight)
        module.register_forward_pre_hook(_refuse_forward)
        module.register_state_dict_pre_hook(_refuse_state)
        module.register_load_state_dict_pre_hook(_refuse_state)
        for method, action in _READERS.items():
            module.__dict__[method] = functools.partial(_refuse, type(module).__name__, action)
        freed.append(weight)
    return freed
