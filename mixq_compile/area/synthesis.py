"""Areas of the circuits in `rtl`, measured by logic synthesis with yosys.

The hierarchy is kept: every module is mapped on its own and a circuit is the sum of its modules, so that
multipliers and adders stay what they are. In one expression, `sum <= sum + a * b`, yosys merges them into one
multi-operand adder, 47 % larger for 8-bit factors and a 24-bit sum. Flattening changes little: circuits of
these files become between 3 % smaller and 10 % larger.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixq_compile.cache_folder import writable_cache_directory
from mixq_compile.errors import MixqError

SOURCES = Path(__file__).parent / "rtl"
LIBRARY = "osu018_stdcells.lib"
LIBRARY_VARIABLE = "MIXQ_LIBERTY"
LIBRARY_PATHS = (f"/usr/share/qflow/tech/osu018/{LIBRARY}", f"/usr/local/share/qflow/tech/osu018/{LIBRARY}")
UNIT_CELL = "NAND2X1"
PROCESSES = 2

READ = "read_verilog -sv {sources}"
GATES = (
    "hierarchy -top requests; synth -top requests; dfflibmap -liberty {library}; abc -liberty {library}; "
    "opt_clean; tee -q -o {report} stat -json"
)
# Multiplexers behind LUTs (MUXF7, MUXF8) would hide logic from a count of LUTs, in some widths more than in
# others.
LUTS = (
    "synth_xilinx -top requests -family xcup -nodsp -nowidelut -noiopad -noclkbuf; opt_clean; "
    "tee -q -o {report} stat -json"
)

Cells = Mapping[str, Mapping[str, int]]
"""Of each module, how many cells of which type it holds itself."""


class ProgramMissing(MixqError):
    """A program that measures or simulates circuits is not installed."""


class SynthesisError(MixqError):
    """A circuit could not be synthesised or simulated."""


@dataclass(frozen=True)
class Circuit:
    """A module of `rtl` with values for its parameters."""

    module: str
    parameters: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        inner = ", ".join(f"{name}={value}" for name, value in self.parameters)
        return f"{self.module}({inner})"

    def instance(self, name: str, connections: str = "") -> str:
        """An instance of it in Verilog."""
        values = ", ".join(f".{parameter}({value})" for parameter, value in self.parameters)
        return f"{self.module} {f'#({values}) ' if values else ''}{name} ({connections});"


@dataclass(frozen=True)
class Synthesis:
    """The measured area of a circuit."""

    unit: str
    parameters: dict[str, int]
    nand2: float
    """Cell area in that of a two-input NAND gate."""
    lut6: int
    """LUTs of up to six inputs on UltraScale+, without DSP blocks."""
    seconds: float
    """What the run took that measured it, divided by the number of circuits in it."""
    yosys_version: str


def circuit(module: str, **parameters: int) -> Circuit:
    """A circuit by its module's name and parameters, which are spelled as in Verilog."""
    return Circuit(module, tuple(sorted(parameters.items())))


def program(name: str, package: str) -> str:
    """The path of a program. Raises ProgramMissing, with the Debian package that holds it."""
    found = shutil.which(name)
    if found is None:
        raise ProgramMissing(
            f"measuring circuits needs the program {name!r}, which is not on this machine: install {package} "
            f"(Debian and Ubuntu: apt-get install {package}). Estimates of area do not need it."
        )
    return found


def library_path() -> Path:
    """The liberty file of the standard cells: $MIXQ_LIBERTY, else where Debian installs it."""
    chosen = os.environ.get(LIBRARY_VARIABLE)
    for path in (chosen,) if chosen else LIBRARY_PATHS:
        if Path(path).is_file():
            return Path(path)
    raise ProgramMissing(
        f"measuring circuits needs the cell library {LIBRARY}, which is not in {chosen or LIBRARY_PATHS[0]}: "
        f"install it (Debian and Ubuntu: apt-get install qflow-tech-osu018), or name a liberty file with a "
        f"cell {UNIT_CELL} in the variable {LIBRARY_VARIABLE}."
    )


@functools.cache
def yosys_version() -> str:
    """What yosys calls its version, such as `0.23`."""
    path = program("yosys", "yosys")
    text = subprocess.run([path, "-V"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"Yosys (\S+)", text)
    return found[1] if found else text.strip()


def sources() -> list[Path]:
    """The Verilog files, `integer.v` first.

    yosys pairs the rows of a multiplier in the order in which it first read the names of their bits, and
    that decides on up to a third of a small multiplier's area: names must be read in a fixed order.
    """
    return sorted(SOURCES.glob("*.v"), key=lambda path: (path.name != "integer.v", path.name))


def synthesise(circuits: Sequence[Circuit], *, cache: bool = True) -> list[Synthesis]:
    """The areas of circuits, in their order.

    Args:
        circuits: what to measure; equal ones are measured once.
        cache: read and write results on disk; they are kept by sources, script, library and yosys.

    Raises:
        ProgramMissing: yosys or the cell library is absent.
        SynthesisError: yosys rejects a circuit.
    """
    directory = _cache_directory() if cache else None
    found: dict[Circuit, Synthesis] = {}
    keys = {one: _key(one) for one in circuits}
    if directory is not None:
        for one, key in keys.items():
            path = directory / f"{key}.json"
            if path.exists():
                found[one] = Synthesis(**json.loads(path.read_text()))
    missing = [one for one in keys if one not in found]
    for result in _measure(missing):
        one = circuit(result.unit, **result.parameters)
        found[one] = result
        if directory is not None:
            _write(directory / f"{keys[one]}.json", asdict(result))
    return [found[one] for one in circuits]


def _measure(circuits: Sequence[Circuit]) -> list[Synthesis]:
    """Two runs side by side, one for gates and one for LUTs, each of all circuits."""
    if not circuits:
        return []
    started = time.perf_counter()
    cells = _cell_areas(library_path())
    with ThreadPoolExecutor(PROCESSES) as pool:
        gates = pool.submit(_run, circuits, GATES)
        luts = pool.submit(_run, circuits, LUTS)
        gate_cells, lut_cells = gates.result(), luts.result()
    seconds = (time.perf_counter() - started) / len(circuits)
    tables: list[tuple[Cells, Mapping[str, float]]] = [
        (gate_cells, {name: area / cells[UNIT_CELL] for name, area in cells.items()}),
        (lut_cells, {f"LUT{inputs}": 1.0 for inputs in range(1, 7)}),
    ]
    results = []
    for index, one in enumerate(circuits):
        nand2, lut6 = (_total(f"request_{index}", *table, {}) for table in tables)
        results.append(
            Synthesis(
                one.module,
                dict(one.parameters),
                round(nand2, 2),
                round(lut6),
                round(seconds, 2),
                yosys_version(),
            )
        )
    return results


def _total(module: str, modules: Cells, areas: Mapping[str, float], known: dict[str, float]) -> float:
    """The area of a module with everything in it; what is neither a module nor has an area costs nothing."""
    if module not in known:
        known[module] = sum(
            count * (_total(kind, modules, areas, known) if kind in modules else areas.get(kind, 0.0))
            for kind, count in modules[module].items()
        )
    return known[module]


def _run(circuits: Sequence[Circuit], script: str) -> Cells:
    """One run of yosys: the cells of every module."""
    executable = program("yosys", "yosys")
    with tempfile.TemporaryDirectory(prefix="mixq_area_") as folder:
        requests = Path(folder) / "requests.v"
        report = Path(folder) / "report.json"
        requests.write_text(_requests(circuits))
        steps = [
            READ.format(sources=" ".join(map(str, [*sources(), requests]))),
            script.format(library=library_path(), report=report),
        ]
        outcome = subprocess.run(
            [executable, "-q", "-"], input="\n".join("\n".join(steps).split(";")) + "\n",
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if outcome.returncode or not report.exists():
            raise SynthesisError(
                f"yosys could not synthesise {', '.join(map(str, circuits))}: it ended with "
                f"{outcome.returncode}:\n{(outcome.stderr or outcome.stdout)[-2000:]}"
            )
        text = report.read_text()
    # yosys writes the design's hierarchy as plain text behind the modules, so the whole is no JSON.
    modules, _ = json.JSONDecoder().raw_decode(text, text.index("{", text.index('"modules"')))
    return {
        # Modules without parameters are listed with a backslash that their instances lack.
        name.removeprefix("\\"): {
            kind.removeprefix("\\"): count for kind, count in found["num_cells_by_type"].items()
        }
        for name, found in modules.items()
    }


def _requests(circuits: Sequence[Circuit]) -> str:
    """A design that holds each circuit once, in a module of its own by which it is found again."""
    lines = []
    for index, one in enumerate(circuits):
        lines += [f"module request_{index};", f"    (* keep *) {one.instance('circuit')}", "endmodule"]
    lines += ["module requests;"]
    lines += [f"    (* keep *) request_{index} request_{index}_ ();" for index in range(len(circuits))]
    return "\n".join([*lines, "endmodule", ""])


def _cell_areas(library: Path) -> dict[str, float]:
    """Areas of the cells in a liberty file."""
    text = library.read_text()
    found = re.findall(r"\bcell\s*\(\s*\"?(\w+)\"?\s*\)\s*\{[^}]*?\barea\s*:\s*([\d.]+)", text)
    areas = {name: float(area) for name, area in found}
    if UNIT_CELL not in areas:
        raise SynthesisError(f"{library} has no cell {UNIT_CELL}, in whose area others are given.")
    return areas


def _key(one: Circuit) -> str:
    """What a result depends on: the circuit, the sources, the script, the library and the program."""
    return hashlib.sha256(f"{one}|{_surroundings()}".encode()).hexdigest()[:24]


@functools.cache
def _surroundings() -> str:
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(library_path().read_bytes())
    digest.update("|".join((READ, GATES, LUTS, yosys_version())).encode())
    return digest.hexdigest()


def _cache_directory() -> Path | None:
    """`synthesis` in the package's cache folder; None where that cannot be written."""
    directory = writable_cache_directory() / "synthesis"
    try:
        directory.mkdir(exist_ok=True)
    except OSError:
        return None
    return directory


def _write(path: Path, content: dict[str, Any]) -> None:
    handle, unfinished = tempfile.mkstemp(suffix=".json", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        json.dump(content, file)
    # Another process may be measuring the same: whoever renames last wins, and both files are alike.
    os.replace(unfinished, path)
