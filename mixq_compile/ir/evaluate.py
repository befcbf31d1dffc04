"""What an operator returns for fake inputs, without a guard on the shapes of the capture."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg

from mixq_compile.ir.shapes import hint_of


class UnknownValueError(LookupError):
    """The value of an input was not recorded when the graph was captured."""


class Evaluator:
    """Runs operators on fake values; what it has computed once for like inputs it does not run again.

    A model repeats its layers, and under symbolic sizes one fake operator takes milliseconds.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        """An evaluator for values of this mode."""
        self.fake_mode = fake_mode
        self._known: dict[Any, Any] = {}

    def __call__(
        self,
        target: Callable[..., Any] | str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        value_of: Callable[[Node], Any],
    ) -> Any:
        """The fake result of a call on nodes; a target of type str is a method of its first argument.

        Raises whatever the operator raises, and what `value_of` raises for an input it does not know.
        """
        values = map_arg(tuple(args), value_of)
        if target is operator.getitem and type(values[0]) is tuple:
            return values[0][values[1]]
        named = map_arg(dict(kwargs), value_of)
        try:
            key = (target, _signature(values), _signature(named))
            if key in self._known:
                return self._known[key]
        except TypeError:
            key = None
        # The Python dispatcher decomposes composite operators, which read symbolic sizes as numbers in C++.
        with torch.no_grad(), _no_new_guards(self.fake_mode), self.fake_mode, enable_python_dispatcher():
            if isinstance(target, str):
                result = getattr(values[0], target)(*values[1:], **named)
            else:
                result = target(*values, **named)
        if key is not None and _is_determined(result):
            self._known[key] = result
        return result


@contextlib.contextmanager
def _no_new_guards(fake_mode: FakeTensorMode) -> Iterator[None]:
    """Leaves the capture's shape environment as it is, whatever the operators ask of it."""
    shapes = fake_mode.shape_env
    with contextlib.ExitStack() as stack:
        if shapes is not None:
            stack.enter_context(shapes.suppress_guards())
            stack.enter_context(shapes.ignore_fresh_unbacked_symbols())
        yield


def _signature(value: Any) -> Any:
    """What of a value decides an operator's fake result. Raises TypeError where that is not known."""
    if isinstance(value, Tensor):
        if not isinstance(value, FakeTensor) or value.layout is not torch.strided:
            raise TypeError
        sizes = tuple([_signature(size) for size in (*value.shape, *value.stride())])
        return value.dtype, value.device, sizes
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return type(value), value.node.expr
    if isinstance(value, (list, tuple)):
        return tuple([_signature(item) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _signature(item)) for name, item in value.items()])
    if isinstance(value, slice):
        return slice, _signature((value.start, value.stop, value.step))
    hash(value)
    return type(value), value


def _is_determined(result: Any) -> bool:
    """False where sizes depend on data: each call has a size of its own then."""
    if isinstance(result, (list, tuple)):
        return all(_is_determined(item) for item in result)
    if isinstance(result, Tensor):
        return all(hint_of(size) is not None for size in result.shape)
    return not isinstance(result, torch.SymInt)
