"""`release_weights`: frees 16-bit weights after packing, and makes what needs them say so."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.errors import ReleasedWeightError
from mixq_compile.runtime import torch_compat
from mixq_compile.runtime.derived_weights import NEEDED
from mixq_compile.runtime.released_parameter import ADVICE
from mixq_compile.runtime.weight_store import STORE

READ_BESIDE = "the compiled graph reads it beside its codes"


@dataclass(frozen=True)
class Released:
    """What became of the weights of one graph."""

    freed: list[Tensor] = field(default_factory=list)
    kept: list[tuple[Tensor, str]] = field(default_factory=list)
    """Those kept, with the reason, where it has not been said before."""


def owners_of(weights: Iterable[Tensor]) -> dict[int, list[nn.Module]]:
    """For each weight (by id) the modules that hold it, once for each name.

    A backend is given parameters without their modules, so the live modules are searched.
    """
    wanted = {id(weight) for weight in weights}
    found: dict[int, list[nn.Module]] = {key: [] for key in wanted}
    for candidate in gc.get_objects():
        # isinstance would ask a weak proxy for its class, and fail where its object has died.
        if issubclass(type(candidate), nn.Module):
            for parameter in candidate.__dict__.get("_parameters", {}).values():
                if id(parameter) in wanted:
                    found[id(parameter)].append(candidate)
    return found


def why_kept(weight: Tensor, holders: int) -> str | None:
    """Why a weight's memory is not freed; None where it is this one parameter's and nobody else's."""
    if holders != 1:
        return f"{holders} modules hold it" if holders else "no module holds it"
    if type(weight) is not nn.Parameter:
        return f"it is a {type(weight).__name__}, which manages its memory itself"
    # Counted first: a name for the storage here would be one more user.
    users = torch_compat.storage_users(weight)
    storage = weight.untyped_storage()
    if weight.device.type == "cpu" and storage.is_shared():
        return "its memory is shared between processes"
    if not storage.resizable():
        return "its memory belongs to a mapped file or to an array, and is not torch's to free"
    if storage.nbytes() != weight.numel() * weight.element_size():
        return f"it is a part of a memory of {storage.nbytes()} bytes"
    if users > 1:
        return "another tensor, array or handle uses its memory"
    return None


def release(packed: Iterable[Tensor], still_read: Iterable[Tensor] = ()) -> Released:
    """Frees the memory of packed weights that nothing else uses, and says which it kept.

    Running, saving, loading, moving or copying the modules of freed ones raises ReleasedWeightError
    from then on. A kept one stays as it is. `still_read` are packed ones that their graph reads too.
    """
    candidates = [weight for weight in packed if not STORE.is_released(weight)]
    owners = owners_of(candidates)
    outcome = Released()
    refused = [(weight, READ_BESIDE) for weight in still_read]
    for weight in candidates:
        reason = NEEDED if STORE.derived.of(weight) else why_kept(weight, len(owners[id(weight)]))
        if reason is None:
            try:
                STORE.release(weight)
            except RuntimeError as error:
                reason = f"torch does not free it ({str(error).splitlines()[0]})"
        if reason is not None:
            refused.append((weight, reason))
            continue
        guard(owners[id(weight)][0])
        outcome.freed.append(weight)
    outcome.kept.extend(entry for entry in refused if STORE.keep(*entry))
    return outcome


def _lacks_weights(module: nn.Module) -> bool:
    """False again where the user gave the module other weights."""
    return any(
        parameter is not None and STORE.is_released(parameter) for parameter in module._parameters.values()
    )


def _refuse_forward(module: nn.Module, arguments: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    # An export stands fake parameters in for the module's own.
    if _lacks_weights(module) or (torch.compiler.is_exporting() and "_apply" in module.__dict__):
        raise ReleasedWeightError(f"a {type(module).__name__} cannot run uncompiled: {ADVICE}")


def _refuse_state(module: nn.Module, *arguments: Any) -> None:
    if _lacks_weights(module):
        raise ReleasedWeightError(
            f"the state of a {type(module).__name__} cannot be read or loaded: {ADVICE}"
        )


_READERS = {
    "_apply": "moved or cast",
    "__deepcopy__": "copied",
    "__getstate__": "pickled",
}
"""Methods of a module that read its parameters' storage, and what they do."""


class _Guard:
    """Stands on a module in place of one of `_READERS`: refuses while the module lacks weights."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self._module, self._method = module, method

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        module = self._module
        if _lacks_weights(module):
            action = _READERS[self._method]
            raise ReleasedWeightError(f"a {type(module).__name__} cannot be {action}: {ADVICE}")
        unguard(module)
        if self._method == "__deepcopy__":
            from copy import deepcopy

            return deepcopy(module, *arguments)
        ordinary: Callable[..., Any] = getattr(module, self._method)
        return ordinary(*arguments, **named)


def guard(module: nn.Module) -> None:
    """Makes what reads the weights of a module raise ReleasedWeightError."""
    module.register_forward_pre_hook(_refuse_forward)
    module.register_state_dict_pre_hook(_refuse_state)
    module.register_load_state_dict_pre_hook(_refuse_state)
    for method in _READERS:
        module.__dict__[method] = _Guard(module, method)


def unguard(module: nn.Module) -> None:
    """Gives a module its own methods back; the hooks that stay ask each time."""
    for method in _READERS:
        if isinstance(module.__dict__.get(method), _Guard):
            del module.__dict__[method]
