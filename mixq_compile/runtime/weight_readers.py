"""Linears whose weight some module reads instead of calling the linear, found in the model's source."""

from __future__ import annotations

import fnmatch
import functools
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

from mixq_compile.ir.attribute_reads import (
    Call,
    FunctionReads,
    Path,
    Step,
    attribute_reads,
    mentions,
    unwrapped,
)
from mixq_compile.runtime.freed_weight import METADATA, NEW

WEIGHT = "weight"
QUESTIONS = METADATA | NEW
NOT_AT_INFERENCE = re.compile(
    r"__init__|__setstate__|__repr__|extra_repr|post_init|_?(re)?(set|init|initiali[sz]e|tie|prune|resize|load|"
    r"save|from|merge|unmerge|convert|freeze|unfreeze|copy|export|apply_weight_norm|remove_weight_norm)"
    r"(_\w+)?|_?reset_\w*parameters\w*|_load_from_state_dict|_save_to_state_dict|weight"
)
"""Methods that set weights up or write them, and a property `weight`, which hands an inner one on."""
GUARDED = "torch.nn.modules.transformer"
"""torch's encoder, whose fast path steps aside for a weight with `__torch_function__`."""
DEEPEST_CALL = 4


def weight_readers(model: nn.Module, linears: Collection[nn.Module]) -> dict[int, str]:
    """id of each of these linears whose weight is read, with who does it (`MambaMixer.slow_forward`).

    Reads the source of every module's methods; a read of the dtype, the shape and the like does not
    count, nor do initializers and what only training runs. What is not found here meets FreedWeight.
    """
    wanted = {id(linear) for linear in linears}
    readers: dict[int, str] = {}
    for module in model.modules():
        if id(module) in wanted:
            _note_hooks(module, readers)
            continue
        kind: Any = type(module)
        for name, function in _methods_of(module):
            for path in sorted(_read_paths(kind, function, "forward" in name), key=str):
                for found in _resolve(module, path[1]):
                    if id(found) in wanted:
                        readers.setdefault(id(found), f"{type(module).__name__}.{function.__name__}")
    return readers


def _note_hooks(linear: nn.Module, readers: dict[int, str]) -> None:
    """Notes hooks of a linear that read or write its weight."""
    hooks: list[Callable[..., Any]] = [*linear._forward_pre_hooks.values(), *linear._forward_hooks.values()]
    for hook in hooks:
        function = unwrapped(hook) or unwrapped(_written_in(type(hook), "__call__"))
        found = _reads_of(function.__code__) if function is not None else None
        if function is None or found is None:
            continue
        # A bound method and an object have a self before the module.
        place = 0 if isinstance(hook, types.FunctionType) else 1
        parameter = found.parameters[place] if len(found.parameters) > place else ""
        if (parameter, ()) in found.reads | found.writes:
            readers.setdefault(id(linear), f"its hook {function.__qualname__}")


def _methods_of(module: nn.Module) -> Iterator[tuple[str, types.FunctionType]]:
    for name, value in vars(module).items():
        function = unwrapped(value) if isinstance(value, types.MethodType) else None
        if function is not None and value.__self__ is module:
            yield name, function
    kind: Any = type(module)
    yield from _methods_of_class(kind)


@functools.lru_cache(maxsize=1024)
def _methods_of_class(kind: type) -> tuple[tuple[str, types.FunctionType], ...]:
    """The methods and properties of a class that may read a weight at inference."""
    found: list[tuple[str, types.FunctionType]] = []
    overridden: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            if isinstance(value, (staticmethod, classmethod)) or NOT_AT_INFERENCE.fullmatch(name):
                continue
            function = unwrapped(value)
            if function is None or name in overridden or function.__module__ == GUARDED:
                continue
            if "super" not in function.__code__.co_names:
                overridden.add(name)
            if _may_read(kind, function):
                found.append((name, function))
    return tuple(found)


def _may_read(kind: type, function: types.FunctionType) -> bool:
    """True where a function names a weight, or calls a method or global function that does."""
    if mentions(function.__code__, WEIGHT):
        return True
    for name in function.__code__.co_names:
        for called in (function.__globals__.get(name), _written_in(kind, name)):
            if isinstance(called, types.FunctionType) and mentions(called.__code__, WEIGHT):
                return True
    return False


def _reads_of(code: types.CodeType) -> FunctionReads | None:
    return attribute_reads(code, WEIGHT, QUESTIONS)


@functools.lru_cache(maxsize=4096)
def _read_paths(
    kind: type, function: types.FunctionType, writes_too: bool, depth: int = 0
) -> frozenset[Path]:
    """The objects, from a function's parameters on, whose weight it or a function that it calls reads."""
    found = _reads_of(function.__code__)
    if found is None:
        return frozenset()
    paths = set(found.reads | found.writes if writes_too else found.reads)
    for call in found.calls if depth < DEEPEST_CALL else ():
        called = unwrapped(
            getattr(kind, call.name, None) if call.is_method else function.__globals__.get(call.name)
        )
        if called is None or called is function or not _may_read(kind, called):
            continue
        parameters = called.__code__.co_varnames[
            : called.__code__.co_argcount + called.__code__.co_kwonlyargcount
        ]
        given = _arguments(kind, call, parameters)
        for root, steps in _read_paths(kind, called, writes_too, depth + 1):
            for outer, before in given.get(root, ()):
                paths.add((outer, (*before, *steps)))
    own = found.parameters[0] if depth == 0 and found.parameters else None
    return frozenset(path for path in paths if own is None or path[0] == own)


def _arguments(kind: type, call: Call, parameters: tuple[str, ...]) -> Mapping[str, frozenset[Path]]:
    """What a call hands to each parameter; `self` is left out, because methods are read themselves."""
    bound = call.is_method and not isinstance(_written_in(kind, call.name), staticmethod)
    given = dict(zip(parameters[1:] if bound else parameters, call.positional, strict=False))
    return {**given, **call.named}


def _written_in(kind: type, name: str) -> Any:
    """A class's attribute as it is written there, without binding."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _resolve(value: Any, steps: tuple[Step, ...]) -> Iterator[Any]:
    """The objects that a path leads to in this instance."""
    if not steps:
        yield value
        return
    (kind, name), rest = steps[0], steps[1:]
    if kind == "item":
        found = _items(value, name)
    elif kind == "pattern":
        children = value._modules if isinstance(value, nn.Module) else {}
        found = [child for own, child in children.items() if fnmatch.fnmatchcase(own, name)]
    else:
        found = [_attribute(value, name)]
    for each in found:
        if each is not None:
            yield from _resolve(each, rest)


def _attribute(value: Any, name: str) -> Any:
    if isinstance(value, nn.Module):
        if name in value._modules:
            return value._modules[name]
        if name in vars(value):
            return vars(value)[name]
        if not isinstance(_written_in(type(value), name), property):
            return None
    try:
        return getattr(value, name, None)
    except Exception:  # A property of the model's own may raise anything.
        return None


def _items(value: Any, key: Any) -> list[Any]:
    if isinstance(value, (nn.ModuleDict, dict)):
        held = dict(value.items())
    elif isinstance(value, (nn.ModuleList, nn.Sequential, list, tuple)):
        held = dict(enumerate(value))
    else:
        return []
    if key is None:
        return list(held.values())
    if isinstance(key, int) and key < 0:
        key += len(held)
    return [held[key]] if isinstance(key, (int, str)) and key in held else []
