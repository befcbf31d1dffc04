"""What an operator returns for fake inputs, without a guard on the shapes of the capture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg


class UnknownValueError(LookupError):
    """The value of an input was not recorded when the graph was captured."""


@contextlib.contextmanager
def no_new_guards(fake_mode: FakeTensorMode) -> Any:
    """Leaves the capture's shape environment as it is, whatever the operators ask of it."""
    shapes = fake_mode.shape_env
    with contextlib.ExitStack() as stack:
        if shapes is not None:
            stack.enter_context(shapes.suppress_guards())
            stack.enter_context(shapes.ignore_fresh_unbacked_symbols())
        yield


def evaluate(
    target: Callable[..., Any] | str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    value_of: Callable[[Node], Any],
    fake_mode: FakeTensorMode,
) -> Any:
    """The fake result of a call on nodes; a target of type str is a method of its first argument.

    Raises whatever the operator raises, and what `value_of` raises for an input it does not know.
    """
    values = map_arg(tuple(args), value_of)
    named = map_arg(dict(kwargs), value_of)
    with torch.no_grad(), no_new_guards(fake_mode), fake_mode:
        if isinstance(target, str):
            return getattr(values[0], target)(*values[1:], **named)
        return target(*values, **named)
