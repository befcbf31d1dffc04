"""Registers the operators of `mixq::`: as `torch.library.custom_op` does, with fewer layers in each call.

A call of a custom_op runs through four Python functions; here through one, and one more outside of inference
mode. What those do is kept: writes are counted, a result that shares memory with an operand is refused, and a
gradient that is asked for raises in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mixq_compile.errors import KernelError, MixqError

_LIBRARY = torch.library.Library("mixq", "FRAGMENT")  # type: ignore[no-untyped-call]
_AFTER_AUTOGRAD = torch._C._after_autograd_keyset


class Operator:
    """One operator, called with the arguments of the function that implements it on every device."""

    def __init__(
        self, name: str, function: Callable[..., Any], mutates_args: Sequence[str], tags: Sequence[torch.Tag]
    ) -> None:
        """Defines `mixq::name` by the function's signature; `mutates_args` names what it writes."""
        functools.update_wrapper(self, function)
        self._name = name
        self._init_fn = function
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates_args))
        _LIBRARY.define(name + schema, tags=(*tags, torch.Tag.pt2_compliant_tag))
        self._opoverload = getattr(torch.ops.mixq, name).default
        arguments = self._opoverload._schema.arguments
        self._written = tuple(place for place, each in enumerate(arguments) if each.is_write)

        # Dynamo would compile the Python that runs within a call, and cannot be kept off a method.
        @torch._disable_dynamo  # type: ignore[untyped-decorator,attr-defined]
        def run(*arguments: Any) -> Any:
            return self._run(*arguments)

        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, self._without_gradient, "Autograd", with_keyset=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the operator through the dispatcher."""
        return self._opoverload(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<operator mixq::{self._name}>"

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Registers what gives results without memory, of which only shapes, dtypes and strides count."""
        torch.library.register_fake(f"mixq::{self._name}", function, lib=_LIBRARY)
        return function

    def register_vmap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Registers what `torch.vmap` calls: `rule(info, in_dims, *operands)` gives result and dimension."""
        torch.library.register_vmap(f"mixq::{self._name}", rule, lib=_LIBRARY)
        return rule

    def _run(self, *arguments: Any) -> Any:
        for place in self._written:
            _count_write(arguments[place])
        result = self._init_fn(*arguments)
        results = result if isinstance(result, tuple) else (result,)
        if torch._C._any_output_is_alias_to_input_or_output(arguments, {}, results):
            raise KernelError(
                f"mixq::{self._name}: a result shares memory with an operand or with another result: its "
                "provider must return new tensors, since compiled graphs write over what nothing reads."
            )
        return result

    def _without_gradient(self, keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and _has_tangent(arguments):
            # Without a rule the tangent would be dropped, which reads as a derivative of zero.
            raise _no_gradient(self)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            if torch._C._are_functorch_transforms_active():
                raise _no_gradient(self)
            return _NoGradient.apply(self, keyset, *arguments)  # type: ignore[no-untyped-call]
        return self._below_autograd(keyset, arguments)

    def _below_autograd(self, keyset: Any, arguments: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._opoverload.redispatch(keyset & _AFTER_AUTOGRAD, *arguments)


class _NoGradient(torch.autograd.Function):
    """Computes, and raises where a gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, keyset: Any, *arguments: Any) -> Any:
        ctx.operator = operator
        return operator._below_autograd(keyset, arguments)

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        raise _no_gradient(ctx.operator)


def _no_gradient(operator: Operator) -> MixqError:
    return MixqError(
        f"mixq::{operator._name} has no gradient: run it under torch.no_grad() or "
        "torch.inference_mode(), or detach its input."
    )


def _has_tangent(argument: Any) -> bool:
    if isinstance(argument, Tensor):
        return forward_ad.unpack_dual(argument).tangent is not None
    return isinstance(argument, (list, tuple)) and any(_has_tangent(each) for each in argument)


class _Ended(torch.autograd.Function):
    """Passes a result on, and raises where a gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, result: Tensor, name: str) -> Tensor:
        ctx.name = name
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        raise MixqError(
            f"the quantized linear {ctx.name!r} has no gradient: its weight is integer codes. Run the model "
            "under torch.no_grad() or torch.inference_mode(), or train before mixq_compile.quantize."
        )


def without_gradient(result: Tensor, name: str) -> Tensor:
    """The result of the linear of this name, in a graph of autograd that ends here with an error in words."""
    if result.requires_grad or torch._C._are_functorch_transforms_active():
        return result
    anchor = torch.empty(0, dtype=result.dtype, device=result.device, requires_grad=True)
    ended: Tensor = _Ended.apply(anchor, result, name)  # type: ignore[no-untyped-call]
    return ended


def _count_write(written: Any) -> None:
    """Counts a write as PyTorch does for its own operators, of a tensor or each of a list."""
    if isinstance(written, Tensor):
        if not written.is_inference():
            torch.autograd.graph.increment_version(written)
    elif written is not None:
        for each in written:
            _count_write(each)


def operator(
    name: str, *, mutates_args: Sequence[str], tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates the implementation of an operator, such as `mixq::quantize`, for every device.

    Args:
        name: with the namespace, which is mixq.
        mutates_args: names of the operands that it writes.
        tags: of the operator.
    """
    space, _, plain = name.partition("::")
    if space != "mixq" or not plain:
        raise MixqError(f"{name!r} is no name of an operator of mixq: write mixq::name.")
    return lambda function: Operator(plain, function, mutates_args, tags)
