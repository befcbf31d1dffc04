"""Why a linear module cannot be swapped for another: what hangs on the very module or on its weight."""

from __future__ import annotations

import functools
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from mixq_compile.ir.linears import is_conv1d, is_plain_linear
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.schemes.registry import get_scheme

COMPUTED = "its weight is computed, not a parameter"
OWN_NAMES = ("weight", "bias")
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""Dictionaries of hooks that a swapped linear takes over."""
OTHER_HOOKS = {
    "_state_dict_hooks": "state-dict hooks",
    "_state_dict_pre_hooks": "state-dict hooks",
    "_load_state_dict_pre_hooks": "state-dict hooks",
    "_load_state_dict_post_hooks": "state-dict hooks",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward hooks",
}
"""Dictionaries of hooks that a module of codes, without gradients, cannot serve."""
DEEPEST = 4
"""How many containers inside each other are searched for a linear."""


@functools.cache
def _ordinary_attributes() -> frozenset[str]:
    return frozenset(vars(nn.Linear(1, 1, device="cpu"))) | {"in_features", "out_features"}


def extra_attributes(linear: nn.Module) -> dict[str, Any]:
    """What was set on a linear beside the attributes that each has."""
    ordinary = _ordinary_attributes()
    return {name: value for name, value in vars(linear).items() if name not in ordinary}


def is_uninitialized(weight: Any) -> bool:
    """True for the weight of an `nn.LazyLinear` that has not run."""
    return isinstance(weight, UninitializedParameter)


def obstacle(linear: nn.Module) -> str | None:
    """Why this module cannot be swapped; None where it can."""
    if is_uninitialized(linear._parameters.get("weight")):
        return "its weight has no shape yet: run the model once first"
    if "weight" not in linear._parameters or is_parametrized(linear, "weight"):
        return COMPUTED
    if "bias" not in linear._parameters or is_parametrized(linear):
        return "its bias is computed, not a parameter"
    if not (is_plain_linear(linear) or is_conv1d(linear)):
        return f"its class {type(linear).__name__}, a subclass of nn.Linear, may compute something else"
    parts = [
        name for name in (*linear._parameters, *linear._buffers, *linear._modules) if name not in OWN_NAMES
    ]
    if parts:
        return f"it has parameters, buffers or modules of its own: {', '.join(parts)}"
    for attribute, kind in OTHER_HOOKS.items():
        if getattr(linear, attribute, None):
            return f"it has {kind}"
    for name, value in extra_attributes(linear).items():
        if callable(value) and hasattr(type(linear), name):
            return f"its {name} is replaced on the instance"
        if hasattr(MixqLinear, name) or name in _attributes_of_codes():
            return f"it has an attribute {name!r} of its own, which a MixqLinear needs"
    return None


@functools.cache
def _attributes_of_codes() -> frozenset[str]:
    made = vars(
        MixqLinear.from_linear(nn.Linear(16, 16, device="cpu", dtype=torch.float32), get_scheme("w8a8"))
    )
    own = {*made, *made["_buffers"], *made["_parameters"]} - set(OWN_NAMES)
    return frozenset(own) - frozenset(vars(nn.Module()))


def take_over(swapped: MixqLinear, linear: nn.Module) -> None:
    """Gives a swapped linear the hooks of the linear before it, and what was set on that.

    The dictionaries of hooks are the same objects, so that the handles of the hooks remove them still.
    """
    for name in HOOKS:
        vars(swapped)[name] = vars(linear)[name]
    vars(swapped).update(extra_attributes(linear))


def replace_in_containers(model: nn.Module, linear: nn.Module, swapped: nn.Module) -> None:
    """Puts a swapped linear in the linear's place in lists and dicts that modules have as attributes."""
    for module in model.modules():
        for container in vars(module).values():
            entries = _entries(container)
            for key in [key for key, value in entries if value is linear]:
                container[key] = swapped


def _entries(container: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a list or dict that can be written; of anything else none."""
    if isinstance(container, list):
        return list(enumerate(container))
    return list(container.items()) if isinstance(container, dict) else []


def holders_outside(model: nn.Module, linears: Collection[nn.Module]) -> dict[int, str]:
    """id of each linear that a module holds where a swap does not reach it, with the attribute's name.

    Looked through are containers among the attributes of modules, and functions, bound methods and
    partials with what they enclose. A linear that stands in a list or dict itself can be replaced there.
    """
    wanted: dict[int, int] = {}
    for linear in linears:
        wanted[id(linear)] = id(linear)
        wanted.update((id(each), id(linear)) for each in linear._parameters.values() if each is not None)
    ordinary = frozenset(vars(nn.Module()))
    holders: dict[int, str] = {}
    for module in model.modules():
        if id(module) in wanted:
            continue
        for name, value in vars(module).items():
            if name in ordinary:
                continue
            entries = _entries(value)
            parts = [part for _, part in entries if not isinstance(part, nn.Module)] if entries else [value]
            for found in (found for part in parts for found in _held(part, DEEPEST)):
                if id(found) in wanted:
                    holders.setdefault(wanted[id(found)], f"{type(module).__name__}.{name}")
    return holders


def _held(value: Any, depth: int) -> Iterator[Any]:
    yield value
    inner: Iterable[Any] = ()
    if isinstance(value, (list, tuple, set, frozenset)):
        inner = value
    elif isinstance(value, Mapping) and not isinstance(value, nn.Module):
        inner = (*value.keys(), *value.values())
    elif isinstance(value, functools.partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        inner = (value.__self__,)
    elif isinstance(value, types.FunctionType):
        cells = [cell for cell in value.__closure__ or () if _is_filled(cell)]
        inner = (*(cell.cell_contents for cell in cells), *(value.__defaults__ or ()))
    if depth:
        for each in inner:
            yield from _held(each, depth - 1)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True
