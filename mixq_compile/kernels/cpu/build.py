"""Compiles the C++ kernels for this machine on first use, keeps the result on disk and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mixq_compile.cache_folder import CACHE_VARIABLE as CACHE_VARIABLE
from mixq_compile.cache_folder import cache_directory as cache_directory
from mixq_compile.cache_folder import cached
from mixq_compile.cache_folder import writable_cache_directory as _writable_directory
from mixq_compile.errors import KernelError
from mixq_compile.kernels.cpu.interface import open_library

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
MAIN_SOURCE = "kernels.cpp"
FLAGS = (
    "-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-math-errno",
    # Codes must have the reference's bits: no fused multiply-add that the source does not ask for.
    "-ffp-contract=off",
)  # fmt: skip
NATIVE = "-march=native"


def compiler() -> str:
    """The path of the C++ compiler, $CXX or g++. Raises KernelError where there is none."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise KernelError(
            f"the CPU kernels are compiled on first use, and there is no C++ compiler {name!r} here: install "
            "g++ (Debian and Ubuntu: apt-get install g++), or name another compiler in the variable CXX."
        )
    return found


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _fingerprint(program: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    for part in (program, version, *flags, _processor() if NATIVE in flags else platform.machine()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def compiled_library(architecture: str) -> Path:
    """The path of the compiled kernels, which it compiles where they are not in the cache.

    Raises KernelError where there is no compiler, or where it fails.
    """
    program = compiler()
    flags = (*FLAGS, architecture)
    name = f"cpu_kernels_{_fingerprint(program, flags)}.so"
    if cached(name).exists():
        return cached(name)
    directory = _writable_directory()
    log.info("compiling the CPU kernels into %s (once, some seconds)", directory)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=directory)
    os.close(handle)
    command = [program, *flags, str(SOURCES / MAIN_SOURCE), "-o", unfinished]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        os.unlink(unfinished)
        raise KernelError(
            f"the C++ compiler could not compile the CPU kernels: {' '.join(command)} ended with "
            f"{outcome.returncode}:\n{outcome.stderr[-2000:]}\nThey need g++ 9 or newer with OpenMP."
        )
    # Another process may be doing the same: whoever renames last wins, and both files are alike.
    os.replace(unfinished, directory / name)
    return directory / name


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled and loaded once per process. Raises KernelError where that is impossible.

    torch is loaded before, so its libgomp serves them as well, and they share its threads.
    """
    try:
        return open_library(compiled_library(NATIVE))
    except OSError as error:
        raise KernelError(f"the compiled CPU kernels cannot be loaded: {error}") from error
