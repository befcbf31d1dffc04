"""A folder that shows by itself how a pipeline breaks a program: its inputs, its passes and a script."""

from __future__ import annotations

import ast
import importlib.metadata
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import ExportedProgram

from mixq_compile.calibration import CalibrationStats
from mixq_compile.errors import OptionError
from mixq_compile.ir.without_data import has_data
from mixq_compile.pipeline import Pipeline
from mixq_compile.pipeline.bisection import Rewrite
from mixq_compile.pipeline.registry import ENTRY_POINT_GROUP
from mixq_compile.runtime.candidates import Example
from mixq_compile.version import __version__

PROGRAM, INPUTS, STATISTICS = "program.pt2", "inputs.pt", "stats.safetensors"
PIPELINE, CULPRIT, SCRIPT = "pipeline.txt", "culprit.txt", "reproduce.py"
PASSES, CHECK = "passes", "check"
"""Folders within the folder: passes of the user's own, and the scripts that a check runs."""

PACKAGE = "mixq_compile"
SCRIPT_SUFFIXES = (".py", ".sh")

_HEADING = '''\
"""Shows a rewrite of a graph that broke a model, or the pass that fails; culprit.txt says what was found.

Exits with 1 where it does so here. Needs mixq-compile ({release}), torch ({torch}), and the libraries
below whose classes the model takes or returns.
"""

'''
_IMPORTS = """\
import argparse
import importlib
import sys
from pathlib import Path

import torch

from mixq_compile import ops  # noqa: F401  # defines the operators that program.pt2 may call
from mixq_compile.calibration import CalibrationStats
from mixq_compile.evaluation import sqnr
from mixq_compile.inspection.text import print_diff
from mixq_compile.pipeline import Fuel, PassContext, Pipeline
from mixq_compile.pipeline.bisection import rewrite_diff, rewrites
from mixq_compile.pipeline.registry import default_registry
from mixq_compile.runtime.candidates import ByCheck, BySqnr, Example, judged, rewrite, unrewritten
from mixq_compile.runtime.weight_store import WeightStore

"""
_BODY = """
FOLDER = Path(__file__).resolve().parent


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fuel", type=int, default=REWRITE, help="the number of the rewrite to look at")
    parser.add_argument("--sqnr", type=float, default=SQNR, help="the least SQNR in dB that is good")
    parser.add_argument("--check", default=CHECK, help="a command that judges a candidate, {} its .pt2")
    return parser.parse_args()


def main():
    options = arguments()
    sys.path.insert(0, str(FOLDER / "passes"))
    for name in LIBRARIES:
        importlib.import_module(name)  # whose classes the program takes or returns
    for name in PASSES:
        default_registry().add_module(importlib.import_module(name))
    pipeline = Pipeline.parse((FOLDER / "pipeline.txt").read_text().strip())
    args, kwargs = torch.load(FOLDER / "inputs.pt", weights_only=False)
    example = Example(torch.export.load(FOLDER / "program.pt2"), args, kwargs)
    statistics = FOLDER / "stats.safetensors"
    stats = CalibrationStats.load(statistics) if statistics.exists() else None

    def run(fuel):
        context = PassContext(stats=stats, weights=WeightStore(), fuel=Fuel(fuel))
        return rewrite(example.program, pipeline, context)

    if options.fuel is None:
        failure = run(None).failure
        print(failure or "no pass fails here.")
        return 1 if failure else 0

    before, after = run(options.fuel - 1), run(options.fuel)
    made = rewrites(pipeline, after.history)
    if not 0 < options.fuel <= len(made):
        sys.exit(f"there is no rewrite {options.fuel}: with this fuel the pipeline makes {len(made)}.")
    last = made[-1]
    print(f"rewrite {options.fuel}", *last.lines(), sep="\\n")
    if options.fuel == REWRITE and (last.spec, last.decision.node) != FOUND:
        print(f"  note: not the one that was found, which was {' at '.join(FOUND)}")
    diff = rewrite_diff(last, before.history, after.history)
    if diff is not None:
        print_diff(diff)

    least = options.sqnr if options.sqnr is not None else float("-inf")
    judges = [BySqnr(example, unrewritten(example.program).outputs(example), least, sqnr)]
    if options.check is not None:
        # The first one decides, and sees the candidate before it has run.
        judges.insert(0, ByCheck(example, options.check, FOLDER if options.check == CHECK else None))
    for count, candidate in ((options.fuel - 1, before), (options.fuel, after)):
        verdicts = [judged(candidate, judge) for judge in judges]
        good = verdicts[0].good
        reasons = dict.fromkeys(verdict.reason for verdict in verdicts)
        print(f"with {count} rewrites: {'good' if good else 'bad'}, {', '.join(reasons)}")
    if after.failure is not None:
        print(after.failure)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
"""


@dataclass(frozen=True)
class Finding:
    """What a reproducer shows, and how its script tells good from bad."""

    text: str
    """What was found, for a reader."""
    rewrite: Rewrite | None = None
    """The rewrite that broke it. None: the whole pipeline is run, and a failing pass is what is bad."""
    sqnr: float | None = None
    """The least SQNR in dB that is good; None where a check or a failure decides."""
    check: str | None = None
    """The command that decides."""


def require_empty(folder: Path) -> None:
    """Raises OptionError for a folder that a reproducer would overwrite."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "has files in it" if folder.is_dir() else "is a file"
        raise OptionError(f"{folder} {what}: give another folder for the reproducer, or remove this one.")


def write_reproducer(
    folder: Path,
    example: Example,
    pipeline: Pipeline,
    finding: Finding,
    stats: CalibrationStats | None = None,
) -> None:
    """Writes a folder whose `reproduce.py` shows a finding, with nothing but the package installed.

    Holds the captured program, its inputs, the pipeline, the statistics if there are any, the sources of
    passes that are not the package's, and the scripts that the check names. For a pass that fails, give
    `Finding(str(error))`. Raises OptionError for a folder with files in it, and for a program without
    weights.
    """
    require_empty(folder)
    if not all(has_data(tensor) for tensor in example.program.state_dict.values()):
        raise OptionError("a reproducer holds the model's weights, and this one was captured without them.")
    modules = _own_modules(pipeline)
    sources = _sources(modules)
    folder.mkdir(parents=True, exist_ok=True)
    torch.export.save(example.program, folder / PROGRAM)
    torch.save((example.args, dict(example.kwargs)), folder / INPUTS)
    (folder / PIPELINE).write_text(f"{pipeline}\n")
    (folder / CULPRIT).write_text(finding.text.rstrip() + "\n")
    if stats is not None:
        stats.save(folder / STATISTICS)
    for place, source in sources.items():
        _copy(source, folder / PASSES / place)
    rewrite = finding.rewrite
    constants = {
        "REWRITE": rewrite.number if rewrite is not None else None,
        "FOUND": (rewrite.spec, rewrite.decision.node) if rewrite is not None else None,
        "SQNR": finding.sqnr,
        "CHECK": _copy_check(finding.check, folder) if finding.check is not None else None,
        "LIBRARIES": sorted(_libraries(example.program)),
        "PASSES": modules,
    }
    heading = _HEADING.format(release=__version__, torch=torch.__version__)
    lines = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
    (folder / SCRIPT).write_text(heading + _IMPORTS + lines + _BODY)


def _libraries(program: ExportedProgram) -> set[str]:
    """The modules of the classes that a program takes or returns: loading it needs them."""
    waiting = [program.call_spec.in_spec, program.call_spec.out_spec]
    found = set()
    while waiting:
        spec = waiting.pop()
        if spec is not None and spec.type is not None:
            found.add(spec.type.__module__)
            waiting += spec.children()
    return found - {"builtins", "collections"}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def _copy_check(command: str, folder: Path) -> str:
    """Copies the scripts that a command names; the command as it is to be run in the folder."""
    for word in shlex.split(command):
        path = Path(word)
        if path.suffix in SCRIPT_SUFFIXES and path.is_file():
            _copy(path, folder / CHECK / path.name)
            command = command.replace(word, f"{CHECK}/{path.name}")
    return command


# Sources of passes ---------------------------------------------------------------------------------


def _own_modules(pipeline: Pipeline) -> list[str]:
    """The modules of passes that neither this package nor an installed one provides."""
    installed = {entry.module for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    modules = {type(step).__module__ for step in pipeline.passes}
    return sorted(name for name in modules - installed if name.partition(".")[0] != PACKAGE)


def _sources(modules: Iterable[str]) -> dict[Path, Path]:
    """The files of modules and of what they import from their own folder, by their places below it."""
    found: dict[Path, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        place, file = _file_of(name)
        if file is None:
            raise OptionError(f"the module {name} lies in no file that a reproducer could hold.")
        if place not in found:
            found[place] = file
            waiting += _beside(name, place, file)
    return found


def _file_of(name: str) -> tuple[Path, Path | None]:
    """Where a loaded module belongs below the folder that Python finds it in, and its file."""
    file = getattr(sys.modules.get(name), "__file__", None)
    place = Path(*name.split("."))
    if file is None or Path(file).suffix != ".py":
        return place, None
    is_package = Path(file).name == "__init__.py"
    return (place / "__init__.py" if is_package else place.with_suffix(".py")), Path(file).resolve()


def _beside(name: str, place: Path, file: Path) -> Iterator[str]:
    """The modules that a module needs and that Python finds in the same folder, unless all are there."""
    root = file.parents[len(place.parts) - 1]
    if str(root) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return
    for other in _needed(name, file):
        other_place, other_file = _file_of(other)
        if other_file is None or other.partition(".")[0] == PACKAGE:
            continue
        if other_file.parents[len(other_place.parts) - 1] == root:
            yield other


def _needed(name: str, file: Path) -> Iterator[str]:
    """The packages that hold a module, and the modules that its import statements may mean."""
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts)))
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = parts if file.name == "__init__.py" else parts[:-1]
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (source, *(f"{source}.{alias.name}" for alias in node.names))
