# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""What every Triton kernel here shares: Triton itself where it is installed, and facts about the device."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
from torch import Tensor

from mixq_compile.errors import KernelError
from mixq_compile.ops.providers import KernelQuery, refused_format

__all__ = [
    "PRIORITY", "TRITON_PROBLEM", "await_previous_launch", "capability", "ceil_div", "interpreting",
    "merges", "multiprocessors", "on_device", "overlap", "power_of_two", "row_matrix", "supports", "tl",
    "triton",
]  # fmt: skip

PRIORITY = 20
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

try:
    import triton
    import triton.language as tl
except ImportError as error:  # modules of this folder are imported on every machine
    TRITON_PROBLEM: str | None = f"Triton cannot be imported ({error}): pip install 'triton>=3.6'"

    class _Absent:
        """Stands in for `triton` and `triton.language` so that kernels can be defined but not run."""

        @staticmethod
        def jit(function: Any = None, **_options: Any) -> Any:
            return function if function is not None else (lambda decorated: decorated)

        @staticmethod
        def constexpr(value: Any) -> Any:
            return value

    triton = tl = _Absent()
else:
    TRITON_PROBLEM = None


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; a small stand-in for CPU tensors."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def supports(query: KernelQuery) -> bool | str:
    """True on NVIDIA GPUs of compute capability 8.0 or newer, else the reason why not."""
    if TRITON_PROBLEM:
        return TRITON_PROBLEM
    if query.device.type != "cuda":
        return "the Triton kernels need an NVIDIA GPU"
    if torch.version.hip:
        return "the Triton kernels are written for NVIDIA GPUs, and this PyTorch is built for AMD's"
    if query.dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {query.dtype}"
    if (refused := refused_format(query)) is not None:
        return refused
    found = capability(query.device)
    if found < OLDEST_CAPABILITY:
        return f"needs an NVIDIA GPU of compute capability 8.0 or newer; this one has {found[0]}.{found[1]}"
    return True


def merges(query: KernelQuery) -> bool | str:
    """True: each launch costs microseconds, which few rows do not hide, and few columns fill a GPU badly."""
    return True


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's GPU the current one while kernels are launched. Raises KernelError where none can run."""
    if TRITON_PROBLEM:
        raise KernelError(f"{TRITON_PROBLEM}.")
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if interpreting():
        return contextlib.nullcontext()
    raise KernelError(
        f"the Triton kernels cannot run on {x.device}: they need an NVIDIA GPU, or for tests "
        "TRITON_INTERPRET=1 in the environment before triton is imported."
    )


def row_matrix(x: Tensor) -> Tensor:
    """x as `[M, K]` with unit stride along K; a copy only where its memory does not allow a view."""
    matrix = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def power_of_two(number: int, at_least: int = 16) -> int:
    """The smallest power of two that is not below `number` nor below `at_least`."""
    return max(at_least, 1 << (number - 1).bit_length()) if number > 0 else at_least


def ceil_div(number: int, divisor: int) -> int:
    """`number / divisor`, rounded up."""
    return -(-number // divisor)


@triton.jit
def await_previous_launch():
    """Lets the next launch begin, and waits for the one before: the first statement of a kernel.

    A launch with `overlap` starts while the one before it still runs; nothing may be read or written
    before this.
    """
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


def overlap(x: Tensor) -> dict[str, bool]:
    """Launch options that hide a kernel's start behind the end of the one before, on Hopper and later."""
    possible = x.is_cuda and capability(x.device) >= (9, 0)
    return {"OVERLAPS": possible, "launch_pdl": possible}
