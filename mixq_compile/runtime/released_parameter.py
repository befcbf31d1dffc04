"""What a parameter is after its memory was freed: it keeps its shape, and reading its values raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.errors import ReleasedWeightError

ADVICE = (
    "its 16-bit weight was freed by options={'release_weights': True}. Load the model again without that "
    "option, or use mixq_compile.quantize(model), whose result can be run, saved and loaded."
)

_DESCRIPTIVE = (
    *("__get__", "__set__", "__len__", "__hash__", "size", "stride", "dim", "numel", "nelement"),
    *("element_size", "storage_offset", "get_device", "untyped_storage", "data_ptr", "detach", "t"),
    "requires_grad_",
)
"""Functions that look at a tensor without its values."""


def _reads_values(name: str) -> bool:
    if name in _DESCRIPTIVE:
        return False
    # Questions such as is_contiguous, and the private ones that Dynamo asks.
    asks = name.startswith("is_") or (name.startswith("_") and not name.startswith("__"))
    return not asks or name == "is_nonzero"


class ReleasedParameter(nn.Parameter):
    """A parameter without memory. `release_weights` makes one of a parameter by changing its class.

    Torch itself reads through a null pointer there: most operators end the process, and some return
    what lies at that address.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Describes the tensor or gives it other data. Raises ReleasedWeightError for all else."""
        # First of all, and without a helper: Dynamo traces this method, and can follow little.
        if torch.compiler.is_dynamo_compiling():
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[misc,no-untyped-call]
        name = getattr(func, "__name__", str(func))
        if name in ("new_empty", "new_zeros", "new_full"):
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[misc,no-untyped-call]
        if _reads_values(name):
            raise ReleasedWeightError(f"a parameter cannot be read by {name}: {ADVICE}")
        # Tensor's own: what it returns, such as a view, is as unreadable as this parameter.
        result = Tensor.__torch_function__.__func__(cls, func, types, args, kwargs or {})  # type: ignore[attr-defined]
        if func == Tensor.data.__set__ and holds_data(args[0]):  # type: ignore[attr-defined]
            args[0].__class__ = nn.Parameter
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ReleasedWeightError(f"a parameter cannot be pickled: {ADVICE}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise ReleasedWeightError(f"a parameter cannot be copied: {ADVICE}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ReleasedParameter(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def holds_data(tensor: Tensor) -> bool:
    """False where a tensor has elements and no memory for them."""
    return tensor.untyped_storage().nbytes() > 0 or not tensor.numel()


def give_up_memory(parameter: Tensor) -> None:
    """Frees a parameter's memory. Raises RuntimeError, and changes nothing, where torch cannot."""
    parameter.untyped_storage().resize_(0)
    parameter.__class__ = ReleasedParameter
