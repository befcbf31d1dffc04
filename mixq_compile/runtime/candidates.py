"""Programs rewritten with limited fuel, and the verdicts on them: what a bisection compares."""

from __future__ import annotations

import copy
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from mixq_compile import ops  # noqa: F401  # defines torch.ops.mixq, which the program may call
from mixq_compile.errors import MixqError, OptionError
from mixq_compile.ir.effects import written_nodes
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import History, PassContext, PassError, Pipeline
from mixq_compile.runtime.export import dynamic_shapes_of

CANDIDATE_VARIABLE = "MIXQ_CANDIDATE"
CANNOT_TELL, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127


@dataclass(frozen=True)
class Example:
    """An exported program and the inputs that it is run with."""

    program: ExportedProgram
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A program's graph that a pipeline rewrote with as much fuel as its context had."""

    graph: CapturedGraph
    spent: int
    """How many rewrites were made."""
    history: History
    failure: PassError | None
    """Why the pipeline failed; the graph cannot be run then."""

    @torch.no_grad()
    def outputs(self, example: Example) -> list[Tensor]:
        """The floating-point tensors that the rewritten graph returns."""
        return list(_floating_tensors(self.graph.module(*example.args, **example.kwargs)))

    @torch.no_grad()
    def save(self, path: Path, example: Example) -> None:
        """Exports the rewritten graph, with the dynamic sizes of its program, and writes it."""
        kwargs = dict(example.kwargs)
        shapes = dynamic_shapes_of(example.program, example.args, kwargs)
        exported = torch.export.export(
            self.graph.module, example.args, kwargs, dynamic_shapes=shapes, strict=False
        )
        torch.export.save(exported, path)


def rewrite(program: ExportedProgram, pipeline: Pipeline, context: PassContext) -> Candidate:
    """Runs a pipeline over a new graph of a program; that a pass fails is a result too."""
    graph = CapturedGraph.from_export(program)
    _own_state(graph.module)
    try:
        history = pipeline.run(graph, context)
    except PassError as error:
        return Candidate(graph, context.fuel.spent, error.history, error)
    return Candidate(graph, context.fuel.spent, history, None)


def unrewritten(program: ExportedProgram) -> Candidate:
    """The candidate that no pass has touched."""
    return rewrite(program, Pipeline(()), PassContext())


def _own_state(module: GraphModule) -> None:
    """Gives a module copies of its buffers and of what its calls write; those that shared memory still do.

    Quantized modules keep in them which outlier columns they have seen, and a candidate's run must not
    change what the next one computes.
    """
    written = {
        str(node.target)
        for call in module.graph.nodes
        for node in written_nodes(call)
        if node.op == "get_attr"
    }
    held = dict(module.named_buffers(remove_duplicate=False))
    held |= {name: each for name, each in module.named_parameters(remove_duplicate=False) if name in written}
    for name, tensor in copy.deepcopy(held).items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, tensor)


def _floating_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _floating_tensors(item)


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate is good, and why."""

    good: bool
    reason: str
    """In a line: its SQNR, the exit code of the check, or how it failed."""
    sqnr_db: float | None = None
    """None where it was not measured."""
    output: str = ""
    """What the check wrote."""


Judge = Callable[[Candidate], Verdict]


def judged(candidate: Candidate, judge: Judge) -> Verdict:
    """The verdict of a judge; one that failed, or cannot be exported or run, is bad.

    Raises MixqError where the judge cannot tell.
    """
    if candidate.failure is not None:
        return Verdict(False, str(candidate.failure).splitlines()[0].rstrip("."))
    try:
        return judge(candidate)
    except MixqError:
        raise
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        return Verdict(False, f"{type(error).__name__}: {first_line}")


@dataclass(frozen=True)
class BySqnr:
    """Good is a candidate whose outputs are all close to the unrewritten program's."""

    example: Example
    reference: Sequence[Tensor]
    """Outputs of the unrewritten program."""
    least_db: float
    sqnr: Callable[[Tensor, Tensor], float]
    """`mixq_compile.evaluation.sqnr`, which stands beside this layer and not below it."""

    def __call__(self, candidate: Candidate) -> Verdict:
        """The verdict by the output that is furthest off."""
        outputs = candidate.outputs(self.example)
        if [output.shape for output in outputs] != [wanted.shape for wanted in self.reference]:
            return Verdict(False, "it returns tensors of other shapes")
        figures = [self.sqnr(wanted, got) for wanted, got in zip(self.reference, outputs, strict=True)]
        # Of torch, because Python's min overlooks a NaN.
        figure = float(torch.tensor(figures, dtype=torch.float64, device="cpu").min())
        return Verdict(figure >= self.least_db, f"SQNR {figure:.1f} dB", figure)


@dataclass(frozen=True)
class ByCheck:
    """Good is a candidate that a command accepts: exit code 0."""

    example: Example
    command: str
    """A shell's; the candidate's path is put in place of `{}`, and into the variable MIXQ_CANDIDATE."""
    folder: Path | None = None
    """Where it runs; None: the working directory."""

    def __call__(self, candidate: Candidate) -> Verdict:
        """The command's verdict on the exported candidate.

        Raises MixqError for exit code 125, by which the command says that it cannot tell, and OptionError
        where the shell cannot run it.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "candidate.pt2"
            candidate.save(path, self.example)
            code, output = self._run(path)
        if code == CANNOT_TELL:
            raise MixqError(
                f"the check cannot tell whether a candidate is good (exit code {code}), so that the search "
                f"cannot go on. It said: {output.strip() or 'nothing'}"
            )
        if code in (NOT_EXECUTABLE, NOT_FOUND):
            raise OptionError(f"the shell cannot run the check {self.command!r}: {output.strip()}")
        return Verdict(code == 0, f"exit code {code}", output=output)

    def _run(self, candidate: Path) -> tuple[int, str]:
        done = subprocess.run(
            self.command.replace("{}", shlex.quote(str(candidate))),
            shell=True,
            cwd=self.folder,
            env={**os.environ, CANDIDATE_VARIABLE: str(candidate)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        return done.returncode, done.stdout
