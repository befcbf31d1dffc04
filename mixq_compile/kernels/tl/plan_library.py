"""Compiles `plans.cpp` on first use, keeps it on disk, and lets it implement the operators on GPUs."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from mixq_compile.cache_folder import cached, writable_cache_directory
from mixq_compile.errors import KernelError
from mixq_compile.kernels.tl.plan_recording import note_order, recorded
from mixq_compile.kernels.tl.toolkit import TRITON_PROBLEM, interpreting
from mixq_compile.ops import providers
from mixq_compile.ops.state_access import StreamOrder

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
MAIN_SOURCE = "plans.cpp"
FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-w")
SWITCH = "MIXQ_LAUNCH_PLANS"
"""Set to 0, every call launches through Python."""
PLANS_OF_AN_OPERATOR = 512
"""Keys that an operator remembers, each number of rows one; the least recently used one is forgotten."""
_RECORDERS = torch.library.Library("mixq_plans", "DEF")
"""For each operator one of the same schema that also records: what `plans.cpp` calls to get a plan."""


def _folders() -> list[Path]:
    """Headers of PyTorch and of CUDA's driver, which Triton brings along."""
    import triton

    of_torch = Path(torch.__file__).parent / "include"
    of_triton = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    return [of_torch, of_torch / "torch" / "csrc" / "api" / "include", of_triton]


def _command(program: str, target: str) -> list[str]:
    libraries = Path(torch.__file__).parent / "lib"
    modern = int(torch.compiled_with_cxx11_abi())
    return [
        program, *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={modern}", *(f"-I{folder}" for folder in _folders()),
        str(SOURCES / MAIN_SOURCE), "-o", target, f"-L{libraries}", f"-Wl,-rpath,{libraries}",
        "-ltorch_cpu", "-lc10",
    ]  # fmt: skip


def _name(program: str) -> str:
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    for part in (version, torch.__version__, *_command(program, "")):
        digest.update(part.encode() + b"\0")
    return f"launch_plans_{digest.hexdigest()[:16]}.so"


def compiled_library() -> Path:
    """The path of the compiled library, which it compiles where it is not in the cache.

    Raises KernelError where there is no compiler, or where it fails.
    """
    chosen = os.environ.get("CXX", "g++")
    program = shutil.which(chosen)
    if program is None:
        raise KernelError(f"there is no C++ compiler {chosen!r}: install g++, or name another one in CXX.")
    name = _name(program)
    if cached(name).exists():
        return cached(name)
    folder = writable_cache_directory()
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    log.info("compiling the launcher of GPU kernels into %s (once, some seconds)", folder)
    outcome = subprocess.run(_command(program, unfinished), capture_output=True, text=True, check=False)
    if outcome.returncode:
        os.unlink(unfinished)
        raise KernelError(f"{program} ended with {outcome.returncode}:\n{outcome.stderr[-2000:]}")
    # Another process may be doing the same: whoever renames last wins, and both files are alike.
    os.replace(unfinished, folder / name)
    return folder / name


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, loaded. Raises KernelError where that is impossible."""
    try:
        loaded = ctypes.CDLL(str(compiled_library()))
    except OSError as error:
        raise KernelError(f"the compiled launcher cannot be loaded: {error}") from error
    for function in (loaded.mixq_implement, loaded.mixq_offer, loaded.mixq_enter):
        function.restype = ctypes.c_char_p
    loaded.mixq_enter.argtypes = loaded.mixq_leave.argtypes = (ctypes.c_int32,)
    loaded.mixq_leave.restype = None
    loaded.mixq_implement.argtypes = (*[ctypes.c_char_p] * 4, ctypes.c_int64)
    loaded.mixq_offer.argtypes = (ctypes.POINTER(ctypes.c_int64), ctypes.c_int64)
    loaded.mixq_set_flags.argtypes = (ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
    loaded.mixq_count.argtypes = (ctypes.c_char_p, ctypes.c_int32)
    loaded.mixq_count.restype = ctypes.c_int64
    return loaded


def _raise_for(problem: bytes | None) -> None:
    if problem:
        raise KernelError(f"launch plans: {problem.decode(errors='replace')}")


def offer(words: Sequence[int]) -> None:
    """Gives the call that this thread records its plan."""
    _raise_for(library().mixq_offer((ctypes.c_int64 * len(words))(*words), len(words)))


def plans_of(operator: str) -> int:
    """How many plans an operator, such as `mixq::quantize`, keeps now."""
    return int(library().mixq_count(operator.encode(), 1))


def keys_of(operator: str) -> int:
    """How many keys an operator remembers now, with a plan or without."""
    return int(library().mixq_count(operator.encode(), 0))


def forget_plans() -> None:
    """Forgets every plan: for when a call would choose another kernel than it did."""
    if library.cache_info().currsize:
        library().mixq_forget()


def keep_flags(flags: torch.Tensor, stream: int) -> None:
    """Says that launches on this stream of the flags' device take these."""
    if library.cache_info().currsize:
        library().mixq_set_flags(flags.device.index, stream, flags.data_ptr())


def use_driver(functions: Iterable[int | None]) -> None:
    """Hands over the addresses of the functions that `Driver` of plans.cpp lists, in its order."""
    addresses = list(functions)
    library().mixq_use_driver((ctypes.c_void_p * len(addresses))(*addresses))


def _driver() -> list[int | None]:
    cuda = ctypes.CDLL("libcuda.so.1")
    of_torch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
    functions = (
        cuda.cuLaunchKernelEx, cuda.cuTensorMapReplaceAddress, cuda.cuStreamIsCapturing,
        cuda.cuGetErrorString, cuda.cuEventCreate, cuda.cuEventRecord, cuda.cuStreamWaitEvent,
        cuda.cuCtxGetCurrent, cuda.cuDeviceGet, cuda.cuDevicePrimaryCtxRetain, cuda.cuCtxSetCurrent,
        of_torch.aoti_torch_get_current_cuda_stream,
    )  # fmt: skip
    return [ctypes.cast(function, ctypes.c_void_p).value for function in functions]


def implement(
    operator: str, function: Callable[..., Any], key: str, gradient_key: str = "",
    capacity: int = PLANS_OF_AN_OPERATOR,
) -> None:  # fmt: skip
    """Lets plans implement an operator, such as `mixq::quantize`, for a dispatch key.

    Args:
        operator: its name with the namespace.
        function: its implementation in Python, registered for every device.
        key: `CUDA`, in tests `CPU`.
        gradient_key: `AutogradCUDA`, to spare calls without gradients what is registered in Python.
        capacity: how many keys it remembers.
    """
    space, name = operator.split("::")
    schema = getattr(getattr(torch.ops, space), name).default._schema
    _RECORDERS.define(str(schema).removeprefix(f"{space}::"))
    _RECORDERS.impl(name, recorded(function, offer), "CompositeExplicitAutograd")
    texts = (operator, f"mixq_plans::{name}", key, gradient_key)
    _raise_for(library().mixq_implement(*(text.encode() for text in texts), capacity))


@functools.cache
def enabled() -> bool:
    """Lets plans implement all operators on GPUs, once; False where they cannot, which is logged."""
    if TRITON_PROBLEM or interpreting() or not torch.cuda.is_available() or torch.version.hip:
        return False
    if os.environ.get(SWITCH) == "0":
        return False
    try:
        use_driver(_driver())
    except (KernelError, OSError, AttributeError) as error:
        log.warning("launches go through Python, which costs about ten times the host's time: %s", error)
        return False
    # Another allocator can be chosen only before the first allocation.
    usual = torch.cuda.is_initialized() and torch.cuda.get_allocator_backend() == "native"
    library().mixq_allocate_directly(int(usual))
    for name, function in providers.implementations().items():
        implement(f"mixq::{name}", function, "CUDA", "AutogradCUDA")
    providers.on_change(forget_plans)
    StreamOrder.make = SharedOrder
    return True


class SharedOrder(AbstractContextManager[None]):
    """The order of a device's calls that learn, as StreamOrder is, which plans follow as well."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._enter, self._leave = library().mixq_enter, library().mixq_leave

    def __enter__(self) -> None:
        _raise_for(self._enter(self._device))
        note_order()

    def __exit__(self, *exception: object) -> None:
        self._leave(self._device)


providers.after_loading(enabled)
