"""How a model is called with one batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mixq_compile.errors import OptionError


def arguments_of(model: nn.Module, batch: Tensor | Mapping[str, Any] | Sequence[Any]) -> tuple[Any, Any]:
    """Positional and named arguments for a batch: a tensor, a mapping, or a sequence.

    A mapping gives named arguments, or is the one argument of a model that takes all features in one, as
    those of sentence-transformers do. Raises OptionError where the model can be called in neither way.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if not isinstance(batch, Mapping):
        return tuple(batch), {}
    signature = inspect.signature(model.forward)
    if _takes(signature, (), dict(batch)):
        return (), dict(batch)
    first = next(iter(signature.parameters.values()), None)
    if first is not None and "dict" in str(first.annotation).lower() and _takes(signature, (batch,), {}):
        return (dict(batch),), {}
    raise OptionError(_problem(signature, list(batch)))


def _problem(signature: inspect.Signature, names: Sequence[str]) -> str:
    parameters = signature.parameters
    listed = ", ".join(parameters)
    unknown = next((name for name in names if name not in parameters), None)
    if unknown is None or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        given = ", ".join(names)
        return f"the model's forward({listed}) cannot be called with {given} alone: give the rest too."
    return f"the model's forward takes no argument {unknown!r}: it has {listed}."


def _takes(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
