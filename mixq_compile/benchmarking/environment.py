"""Where a measurement was made: device, versions, commit, clocks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mixq_compile.benchmarking.timing import Floor, keep_busy
from mixq_compile.version import __version__

PACKAGES = ("triton", "transformers", "torchao", "bitsandbytes")
CLOCKS = {
    "clocks.sm": "processor_mhz",
    "clocks.max.sm": "processor_max_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
}
"""What nvidia-smi is asked for, and what it is called in a result."""
QUERY_SECONDS = 20


@dataclass(frozen=True)
class Environment:
    """Device, versions and commit of a result, and the floor that the device sets."""

    device: str
    threads: int | None
    """Threads on the CPU; None on a GPU."""
    mixq_compile: str
    torch: str
    cuda: str | None
    python: str
    packages: dict[str, str]
    """Versions of other packages, those that are installed."""
    commit: str
    copy_gigabytes_per_second: float
    launch_us: float
    clocks: dict[str, float] = field(default_factory=dict)
    """What nvidia-smi says while the device multiplies matrices; empty where it says nothing."""


def examine(device: torch.device, floor: Floor, commit: str = "") -> Environment:
    """Everything about this machine that belongs to a result; `commit` stands in where git knows none."""
    on_gpu = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        threads=None if on_gpu else torch.get_num_threads(),
        mixq_compile=__version__,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        commit=commit or _commit(),
        copy_gigabytes_per_second=floor.copy_bytes_per_second / 1e9,
        launch_us=floor.launch_us,
        clocks=_clocks(device) if on_gpu else {},
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str:
    """The commit of the source tree that this file lies in; empty for an installed package."""
    if shutil.which("git") is None:
        return ""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()


def _clocks(device: torch.device) -> dict[str, float]:
    """Clocks and power under load."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    which = torch.cuda.current_device() if device.index is None else device.index
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    number = visible[which] if which < len(visible) and visible[which] else str(which)
    kept = keep_busy(device)
    try:
        asked = subprocess.run(
            [program, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits", f"--id={number}"],
            capture_output=True, text=True, check=False, timeout=QUERY_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    finally:
        torch.cuda.synchronize(device)
        del kept
    values = asked.stdout.strip().split("\n")[0].split(",")
    found = {}
    for name, value in zip(CLOCKS.values(), values, strict=False):
        try:
            found[name] = float(value)
        except ValueError:  # "[N/A]"
            continue
    return found
