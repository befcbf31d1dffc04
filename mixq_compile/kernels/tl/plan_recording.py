# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Launch plans of what a provider does in one call: what it allocates, what it launches, what it returns.

A call is recorded while it runs. Every pointer of a launch must lie in an operand or in memory that the call
allocated, so that a plan names those and holds no address; whatever else a provider does (a copy, an
operator of torch) makes it refuse the plan, and that key keeps running in Python.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Recording", "enqueue", "note_flags", "note_order", "recorded"]

OPERAND, BUFFER, FLAGS = range(3)
"""Where the memory of a pointer lies, as `plans.cpp` numbers it."""
POINTER, NUMBER, DESCRIPTOR = range(3)
"""What a parameter of a kernel is, as `plans.cpp` numbers it."""

MOST_DESCRIPTORS = 8
SCALAR_TYPES = {
    torch.uint8: 0, torch.int8: 1, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6,
    torch.bfloat16: 15,
}  # fmt: skip
"""Numbers that PyTorch's C++ has for dtypes."""
INTEGERS = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u1": 1, "u8": 1, "u16": 2, "u32": 4, "u64": 8}
"""Bytes of Triton's integer types."""
ALLOCATIONS = (
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)  # fmt: skip


class _Current(threading.local):
    recording: Recording | None = None


_CURRENT = _Current()


class Refused(Exception):
    """A call that no plan can repeat; its text says why."""


@dataclass(frozen=True)
class _Operand:
    """An operand's memory: from its address to the end of its last element."""

    start: int
    end: int

    @classmethod
    def of(cls, tensor: Tensor | None) -> _Operand:
        if tensor is None or not tensor.numel():
            return cls(0, 0)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        return cls(start, start + (last + 1) * tensor.element_size())


def _flattened(arguments: Iterable[Any]) -> list[Tensor | None]:
    """Tensors in the order in which `plans.cpp` counts operands; those of lists one by one."""
    found: list[Tensor | None] = []
    for item in arguments:
        if isinstance(item, list | tuple):
            found.extend(_flattened(item))
        elif item is None or isinstance(item, Tensor):
            found.append(item)
    return found


class Recording(TorchDispatchMode):
    """What happens while it is entered, in one thread, as a launch plan."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self._operands = [_Operand.of(tensor) for tensor in _flattened(arguments)]
        self._buffers: list[Tensor] = []
        self._flags: list[int] = []
        self._launches: list[list[int]] = []
        self.ordered = False
        """Whether the call learns, so that it must follow the last that did."""
        self.refusal: str | None = None
        """Why there is no plan; None where there is one."""
        starts = sorted({(operand.start, operand.end) for operand in self._operands if operand.end})
        for (start, end), (after, _) in itertools.pairwise(starts):
            if start != after and end > after:
                self.refuse("operands overlap")

    def refuse(self, reason: str) -> None:
        """Makes this call one without a plan."""
        self.refusal = self.refusal or reason

    def __enter__(self) -> Recording:
        self._outer, _CURRENT.recording = _CURRENT.recording, self
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *exception: Any) -> Any:
        _CURRENT.recording = self._outer
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in ALLOCATIONS:
            self._buffers.append(result)
        elif not function.is_view:
            self.refuse(f"it runs {function}")
        return result

    def note_flags(self, flags: Tensor) -> None:
        """Says that this memory is the stream's flags, which `plans.cpp` looks up in each call."""
        self._flags.append(flags.data_ptr())

    def launched(
        self, kernel: Any, grid: Sequence[int], compiled: Any, arguments: Sequence[Any], options: Any
    ) -> None:
        """Adds a launch that has just taken place."""
        # Of an empty grid nothing is launched, and the driver would refuse it.
        if self.refusal is None and all(grid):
            try:
                self._launches.append(self._launch(kernel, grid, compiled, arguments, options))
            except Refused as refused:
                self.refuse(str(refused))

    def _launch(self, kernel, grid, compiled, arguments, options) -> list[int]:
        metadata = compiled.metadata
        warps, blocks_of_cluster, shared_memory, *_ = compiled.packed_metadata
        if blocks_of_cluster != 1 or metadata.global_scratch_size or metadata.profile_scratch_size:
            raise Refused("a kernel has clusters or scratch memory of its own")
        values = {**dict(zip(kernel.arg_names, arguments, strict=False)), **options}
        described = iter(getattr(metadata, "tensordesc_meta", None) or ())
        parameters: list[list[int]] = []
        for name, kind in compiled.src.signature.items():
            self._add_parameters(parameters, kind, values[name], described)
        # Two pointers to scratch memory, which no kernel here has, end every launch.
        parameters += [[NUMBER, 0], [NUMBER, 0]]
        if sum(parameter[0] == DESCRIPTOR for parameter in parameters) > MOST_DESCRIPTORS:
            raise Refused("a kernel takes too many tensor descriptors")
        sizes = [*grid, 1, 1][:3]
        words = [
            int(compiled.function), *sizes, 32 * warps, shared_memory,
            int(metadata.launch_pdl), int(metadata.launch_cooperative_grid), len(parameters),
        ]  # fmt: skip
        return words + [word for parameter in parameters for word in parameter]

    def _add_parameters(self, parameters: list[list[int]], kind: Any, value: Any, described: Any) -> None:
        if isinstance(kind, tuple):
            for inner_kind, inner in zip(kind, value, strict=True):
                self._add_parameters(parameters, inner_kind, inner, described)
        elif kind == "constexpr":
            pass
        elif kind[0] == "*":
            parameters.append([POINTER, *self._place(value)])
        elif kind in INTEGERS:
            parameters.append([NUMBER, _signed(int(value))])
        elif kind.startswith("tensordesc"):
            meta = next(described, None)
            if meta is None:
                raise Refused("a tensor descriptor is passed in parts")
            place = self._place(value.base)
            parameters.append([DESCRIPTOR, *place, *encoded(value, meta)])
            parameters.extend([NUMBER, int(size)] for size in (*value.shape, *value.strides))
        else:
            raise Refused(f"a kernel takes a parameter of type {kind}")

    def _place(self, tensor: Any) -> tuple[int, int, int]:
        """The memory that a tensor lies in and where in it."""
        if not tensor.numel():
            return self._empty()
        address = tensor.data_ptr()
        storage = tensor.untyped_storage().data_ptr()
        for number, buffer in enumerate(self._buffers):
            if buffer.untyped_storage().data_ptr() == storage:
                return BUFFER, number, address - buffer.data_ptr()
        if address in self._flags:
            return FLAGS, 0, 0
        end = _Operand.of(tensor).end
        holders = [
            (operand.start, -number)
            for number, operand in enumerate(self._operands)
            if operand.start <= address and end <= operand.end
        ]
        if not holders:
            raise Refused("a kernel reads or writes memory that is no operand's")
        start, number = max(holders)
        return OPERAND, -number, address - start

    def _empty(self) -> tuple[int, int, int]:
        """A pointer that is not followed: that of any operand, or of none."""
        if not self._operands:
            raise Refused("there are no operands")
        return OPERAND, 0, 0

    def plan(self, result: Any) -> list[int] | None:
        """The plan as the words that `plans.cpp` reads; None where it has been refused."""
        try:
            results = [self._result(item) for item in _flattened([result])] if result is not None else []
            if len(set(results)) < len(results):
                raise Refused("two results share memory")
            if self.refusal is not None:
                return None
            words = [int(self.ordered), len(self._buffers)]
            views = {self._result(item): item for item in _flattened([result]) if item is not None}
            for number, buffer in enumerate(self._buffers):
                view = views.get(number, buffer)
                if buffer.dtype not in SCALAR_TYPES:
                    raise Refused(f"a kernel uses memory of {buffer.dtype}")
                elements = buffer.untyped_storage().nbytes() // buffer.element_size()
                words += [elements, SCALAR_TYPES[buffer.dtype]]
                words += [view.dim(), *view.shape, view.dim(), *view.stride()]
            words += [len(results), *results, len(self._launches)]
            return words + [word for launched in self._launches for word in launched]
        except Refused as refused:
            self.refuse(str(refused))
            return None

    def _result(self, tensor: Tensor | None) -> int:
        for number, buffer in enumerate(self._buffers):
            if tensor is not None and tensor.untyped_storage()._cdata == buffer.untyped_storage()._cdata:
                if tensor.storage_offset() or tensor.dtype != buffer.dtype:
                    break
                return number
        raise Refused("a result is no memory that the call allocated")


def enqueue(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`, recorded where a call is."""
    compiled = kernel[grid](*arguments, **options)
    if _CURRENT.recording is not None:
        _CURRENT.recording.launched(kernel, grid, compiled, arguments, options)


def note_flags(flags: Tensor) -> None:
    """Says, where a call is recorded, that this memory is that of its stream's flags."""
    if _CURRENT.recording is not None:
        _CURRENT.recording.note_flags(flags)


def note_order() -> None:
    """Says, where a call is recorded, that it learns."""
    if _CURRENT.recording is not None:
        _CURRENT.recording.ordered = True


def recorded(function: Callable[..., Any], offer: Callable[[list[int]], None]) -> Callable[..., Any]:
    """The function, which while it runs is recorded, and its plan offered if it has one."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with Recording(arguments) as recording:
            result = function(*arguments)
        if (words := recording.plan(result)) is not None:
            offer(words)
        return result

    return run


# Tensor descriptors ----------------------------------------------------------------------------

HOST_TYPES = {8: 10, 9: 8, 10: 9}
"""Where the driver numbers the type of a descriptor's elements otherwise than kernels do."""
L2_PROMOTION_128_BYTES = 2
DESCRIPTOR_BYTES = 128


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


@functools.cache
def _encoder() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled


def encoded(descriptor: Any, meta: Any) -> list[int]:
    """A tensor descriptor as words, encoded as Triton's own launcher does."""
    if meta["fp4_padded"] or getattr(descriptor, "round_f32_to_tf32", False) or descriptor.padding == "nan":
        raise Refused("a tensor descriptor has an unusual padding or rounding")
    rank, size = len(descriptor.shape), meta["elem_size"]
    memory = ctypes.create_string_buffer(2 * DESCRIPTOR_BYTES)
    aligned = -(-ctypes.addressof(memory) // DESCRIPTOR_BYTES) * DESCRIPTOR_BYTES
    shape = (ctypes.c_uint64 * rank)(*reversed([int(length) for length in descriptor.shape]))
    strides = (ctypes.c_uint64 * rank)(
        *reversed([int(stride) * size for stride in descriptor.strides[:-1]]), 0
    )
    block = (ctypes.c_uint32 * rank)(*reversed([int(length) for length in meta["block_size"]]))
    steps = (ctypes.c_uint32 * rank)(*[1] * rank)
    failed = _encoder()(
        ctypes.c_void_p(aligned), ctypes.c_int(HOST_TYPES.get(meta["elem_type"], meta["elem_type"])),
        ctypes.c_uint32(rank), ctypes.c_void_p(descriptor.base.data_ptr()), shape, strides, block, steps,
        ctypes.c_int(0), ctypes.c_int(meta["swizzle"]), ctypes.c_int(L2_PROMOTION_128_BYTES), ctypes.c_int(0),
    )  # fmt: skip
    if failed:
        raise Refused(f"a tensor cannot be described (CUDA error {failed})")
    return list((ctypes.c_int64 * (DESCRIPTOR_BYTES // 8)).from_address(aligned))
