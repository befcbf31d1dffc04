"""`FreedWeight`: what stands in the place of a swapped linear's weight; computing with it is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from mixq_compile.errors import ReleasedWeightError

METADATA = frozenset(
    {
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad", "grad_fn",
        "itemsize", "nbytes", "name", "names", "output_nr", "retains_grad", "size", "dim",
        "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "get_device",
        "is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_pinned",
        "is_same_size", "is_inference", "is_cpu", "is_cuda", "is_ipu", "is_leaf", "is_maia",
        "is_meta", "is_mkldnn", "is_mps", "is_mtia", "is_nested", "is_quantized", "is_sparse",
        "is_sparse_csr", "is_vulkan", "is_xla", "is_xpu",
    }
)  # fmt: skip
"""What may be asked of a tensor without reading its numbers: attributes and methods."""
LIKE_ANOTHER = frozenset({"to", "type_as"})
"""Methods of a tensor that read dtype and device of another."""
NEW = frozenset({"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"})
"""Methods that make a tensor of this one's dtype and device."""


class FreedWeight(Tensor):
    """A tensor `[N, K]` with the metadata of a linear's weight and no numbers.

    Shape, dtype, device and the like can be read; whatever reads or sets numbers raises
    ReleasedWeightError with the linear's name. A tensor by class, because models ask `isinstance`
    before they read a dtype; with `__torch_function__`, because torch's own fast paths, which would read
    the weights of their linears, ask for it and then call the linears as modules.
    """

    fqn: str
    """The linear's name; empty where it is not known."""
    _is_hf_initialized = True
    """transformers, which initialises what a file did not hold, leaves it alone."""

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, fqn: str = ""
    ) -> FreedWeight:
        """The placeholder of a weight of this shape, dtype and device."""
        made: FreedWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, torch.Size(shape), dtype=dtype, device=device, requires_grad=False
        )
        made.fqn = fqn
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answers a question about metadata; raises ReleasedWeightError for all else."""
        # An attribute arrives as its getter, whose own name is __get__.
        called = getattr(func, "__name__", str(func))
        name = getattr(getattr(func, "__self__", None), "__name__", called) if called == "__get__" else called
        if name in METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if name in LIKE_ANOTHER and len(args) > 1 and not isinstance(args[0], cls):
            like = [
                argument.empty_like_it() if isinstance(argument, cls) else argument for argument in args[1:]
            ]
            return func(args[0], *like, **(kwargs or {}))
        if name in NEW and isinstance(args[0], cls):
            return func(args[0].empty_like_it(), *args[1:], **(kwargs or {}))
        cls._raise(name, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Raises ReleasedWeightError: reached only where `__torch_function__` is switched off."""
        cls._raise(str(func), args, kwargs)

    @classmethod
    def _raise(cls, name: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> NoReturn:
        pending: list[Any] = [*args, *(kwargs or {}).values()]
        while pending:
            value = pending.pop(0)
            if isinstance(value, cls):
                raise freed_error(value.fqn, f"{name} was called with it")
            if isinstance(value, (list, tuple)):
                pending.extend(value)
        raise freed_error("", f"{name} was called with it")

    def empty_like_it(self) -> Tensor:
        """An empty tensor of this dtype and device."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def data(self) -> FreedWeight:  # type: ignore[override]
        """Itself: its metadata are the same, and it has no numbers either."""
        return self

    def detach(self) -> FreedWeight:
        """Itself."""
        return self

    # Methods in Python, because Dynamo traces no built-in method of an object that it does not know.
    def size(self, dim: int | None = None) -> Any:
        """The shape, or one size of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """2."""
        return len(self.shape)

    ndimension = dim

    def numel(self) -> int:
        """N · K."""
        return self.shape[0] * self.shape[1]

    nelement = numel

    def element_size(self) -> int:
        """Bytes of one element of the freed weight."""
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        """True."""
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        """False."""
        return self.dtype.is_complex

    def get_device(self) -> int:
        """The device's index; -1 for the CPU."""
        return -1 if self.device.index is None else self.device.index

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        """True for the ordinary memory format."""
        return memory_format in (torch.contiguous_format, torch.preserve_format)

    def stride(self, dim: int | None = None) -> Any:
        """The strides `(K, 1)`, or one of them."""
        strides = (self.shape[1], 1)
        return strides if dim is None else strides[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def requires_grad_(self, requires_grad: bool = True) -> FreedWeight:
        """Itself, for code that freezes parameters; raises ReleasedWeightError for True."""
        if requires_grad:
            raise freed_error(self.fqn, "gradients were asked for")
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad":
            self.requires_grad_(value)
        elif name in METADATA or name == "data":
            raise freed_error(self.fqn, f"its {name} was set")
        else:
            object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> FreedWeight:
        made = FreedWeight(self.shape, self.dtype, self.device, self.fqn)
        memo[id(self)] = made
        return made

    def __copy__(self) -> FreedWeight:
        return FreedWeight(self.shape, self.dtype, self.device, self.fqn)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return FreedWeight, (tuple(self.shape), self.dtype, self.device, self.fqn)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"FreedWeight({tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', of={self.fqn!r})"
        )

    def __format__(self, specification: str) -> str:
        return repr(self)


def freed_error(fqn: str, what: str) -> ReleasedWeightError:
    """The error for code that needs the weight of a swapped linear.

    Args:
        fqn: the linear's name; empty where it is not known.
        what: what the code did, as a clause.
    """
    owner = f"the linear {fqn!r}" if fqn else "a linear"
    name = fqn or "the linear's name"
    return ReleasedWeightError(
        f"the weight of {owner} was freed when mixq_compile.quantize put integer codes in its place, and is "
        f"needed: {what}. Where a model uses the weight instead of calling the linear, load it again and "
        f"leave this linear in 16 bit: mixq_compile.quantize(model, ignore=['lm_head', {name!r}]). "
        "MixqLinear.dequantized_weight() gives the numbers that the codes stand for."
    )
