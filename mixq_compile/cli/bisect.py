"""`mixq bisect`: which rewrite broke a model, and a folder that shows it."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixq_compile.cli.inspection_options import CaptureOptions, InspectedModel, PipelineChoice
from mixq_compile.cli.options import Json
from mixq_compile.cli.output import WIDTH, check_folder, console, print_json
from mixq_compile.errors import MixqError, OptionError

if TYPE_CHECKING:
    from rich.console import Console
    from torch.export import ExportedProgram

    from mixq_compile.cli.capturing import Captured
    from mixq_compile.ir.diff import GraphDiff
    from mixq_compile.pipeline import History, PassContext, PassError, Pipeline
    from mixq_compile.pipeline.bisection import Rewrite
    from mixq_compile.runtime.candidates import Example, Judge, Verdict


def bisect(
    model: InspectedModel,
    choice: PipelineChoice,
    capture: CaptureOptions,
    sqnr: Annotated[
        float | None,
        typer.Option(
            metavar="DB",
            help="Good is a graph whose outputs have at least so many dB against the captured one's, on the "
            "inputs of the capture.",
        ),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="CMD",
            help="Good is a graph for which this command exits with 0; 125 says that it cannot tell. {} "
            "stands for the graph as an exported .pt2, and $MIXQ_CANDIDATE holds its path too.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the reproducer.")] = Path(
        "mixq-bisect"
    ),
    verbose: Annotated[bool, typer.Option("--verbose", help="Show on stderr what the check writes.")] = False,
    json: Json = False,
) -> None:
    """Find the one rewrite that broke a model: binary search over how many rewrites are made.

    Takes about log2(rewrites) + 2 runs of the pipeline; a pass that fails counts as bad. Prints the
    rewrite with its pass, reason, layer, Python line and nodes, and writes a folder that shows it again
    with nothing but this package: python DIR/reproduce.py. --fuel is the most rewrites to look at.

    Quantization itself costs accuracy: give --sqnr less than the scheme is expected to reach with all
    rewrites, for example 20, or cut --pipeline to the passes under suspicion, which may be exact. A check
    in Python needs `import mixq_compile.ops` before torch.export.load, and for a transformers model
    `import transformers.modeling_outputs`.

    Example: [bold]mixq bisect MODEL --sqnr 20[/bold]  ·  [bold]mixq bisect MODEL --load my_passes
    --pipeline canonicalize-linear,my-pass --sqnr 100[/bold]  ·  [bold]mixq bisect MODEL --check 'python
    check.py {}'[/bold]
    """
    from mixq_compile.runtime.candidates import Example
    from mixq_compile.runtime.reproducer import SCRIPT, Finding, require_empty, write_reproducer

    _check_criterion(sqnr, check)
    require_empty(output)
    check_folder("--output", output)
    options = choice.options()
    captured = capture.capture(model)
    captured.require_weights("to run it")
    if captured.program.example_inputs is None:
        raise OptionError(f"{model} holds no example inputs, and each graph is run on them: export it anew.")
    example = Example(captured.program, captured.args, captured.kwargs)
    pipeline = choice.pipeline_of(captured.graph())
    judge = _judge_of(captured, example, sqnr, check)

    def attempt(fuel: int | None) -> Trial:
        return _attempt(captured.program, pipeline, choice.context(options, fuel=fuel), judge)

    first_bad, trials = search(attempt, verbose=verbose)
    culprit = culprit_of(pipeline, first_bad, trials)
    finding = Finding(culprit.text, culprit.rewrite, sqnr, check)
    write_reproducer(output, example, pipeline, finding, options.stats)
    if json:
        facts = {"model": model, "pipeline": str(pipeline), "sqnr": sqnr, "check": check}
        runs = [trial.to_json() for trial in trials.values()]
        print_json({**facts, **culprit.to_json(), "runs": runs, "reproducer": str(output)})
        return
    target = console()
    culprit.print(target)
    shown = f"\nwritten to {output}; to see it again: python {output / SCRIPT}"
    target.print(shown, markup=False, soft_wrap=True)


def _check_criterion(sqnr: float | None, check: str | None) -> None:
    if (sqnr is None) == (check is None):
        problem = "exclude each other" if check is not None else "are both missing"
        raise OptionError(
            f"--sqnr and --check {problem}: give one of them, which tells a good graph from a bad one."
        )
    if sqnr is not None and not math.isfinite(sqnr):
        raise OptionError(f"--sqnr takes a number of dB, not {sqnr}.")
    if check is not None and not check.strip():
        raise OptionError("--check takes a command, and this one is empty.")


@dataclass(frozen=True)
class Trial:
    """One run of the pipeline, and the verdict on it."""

    rewrites: int
    """How many were made."""
    verdict: Verdict
    history: History
    failure: PassError | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The run without its history, as JSON-able data."""
        return {
            "rewrites": self.rewrites,
            "good": self.verdict.good,
            "reason": self.verdict.reason,
            "sqnr_db": self.verdict.sqnr_db,
            "failure": str(self.failure) if self.failure is not None else None,
            "seconds": self.seconds,
        }

    @property
    def outcome(self) -> str:
        """The verdict in a line."""
        return f"{'good' if self.verdict.good else 'bad'}, {self.verdict.reason}"


@dataclass(frozen=True)
class Culprit:
    """The rewrite that broke a model."""

    rewrite: Rewrite
    total: int
    """Of how many rewrites."""
    diff: GraphDiff | None
    """What it changed; None where its pass failed."""
    before: Trial
    """The run without it."""
    after: Trial
    """The run with it."""

    def print(self, target: Console) -> None:
        """Prints what is known of it."""
        from mixq_compile.inspection.text import print_diff

        target.print(f"rewrite {self.rewrite.number} of {self.total} broke it", style="bold", markup=False)
        for line in self.rewrite.lines():
            target.print(line, markup=False, soft_wrap=True)
        for trial in (self.before, self.after):
            target.print(f"  with {trial.rewrites} rewrites: {trial.outcome}", markup=False, soft_wrap=True)
        if self.diff is not None:
            target.print()
            print_diff(self.diff, target)
        if self.after.failure is not None:
            target.print(f"\n{self.after.failure}", markup=False, soft_wrap=True)

    @property
    def text(self) -> str:
        """What `print` prints, without colour."""
        from rich.console import Console

        written = io.StringIO()
        self.print(Console(file=written, width=WIDTH, color_system=None, highlight=False, emoji=False))
        return written.getvalue()

    def to_json(self) -> dict[str, Any]:
        """The rewrite as JSON-able data."""
        return {
            "rewrite": self.rewrite.number,
            "rewrites": self.total,
            "pass": {"index": self.rewrite.index, "spec": self.rewrite.spec},
            "decision": asdict(self.rewrite.decision),
            "diff": self.diff.to_json() if self.diff is not None else None,
            "failure": str(self.after.failure) if self.after.failure is not None else None,
        }


def _judge_of(captured: Captured, example: Example, sqnr: float | None, check: str | None) -> Judge:
    """What tells good from bad. Raises OptionError where there are no outputs to compare."""
    from mixq_compile import evaluation
    from mixq_compile.runtime.candidates import ByCheck, BySqnr, unrewritten

    if check is not None:
        return ByCheck(example, check)
    assert sqnr is not None
    reference = unrewritten(captured.program).outputs(example)
    if not reference:
        raise OptionError(
            f"--sqnr compares floating-point outputs, and {captured.source} returns none: give --check."
        )
    return BySqnr(example, reference, sqnr, evaluation.sqnr)


def _attempt(program: ExportedProgram, pipeline: Pipeline, context: PassContext, judge: Judge) -> Trial:
    """Runs the pipeline with the fuel of the context, and judges the result."""
    from mixq_compile.runtime.candidates import judged, rewrite

    begin = time.perf_counter()
    candidate = rewrite(program, pipeline, context)
    verdict = judged(candidate, judge)
    seconds = time.perf_counter() - begin
    return Trial(candidate.spent, verdict, candidate.history, candidate.failure, seconds)


def search(attempt: Callable[[int | None], Trial], *, verbose: bool) -> tuple[int, dict[int, Trial]]:
    """The number of the rewrite that broke it, and all runs by their rewrites; a line on stderr for each.

    Raises MixqError where no rewrite is to blame, or where runs with the same fuel differ.
    """
    from rich.progress import Progress
    from rich.text import Text

    from mixq_compile.pipeline.bisection import (
        BrokenFromTheStartError,
        NothingBrokenError,
        Probe,
        bisect_fuel,
        most_runs,
    )

    with Progress(console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("all rewrites", total=None)
        # How many rewrites there are is known once all of them have been made.
        full = attempt(None)
        total, trials = full.rewrites, {full.rewrites: full}
        progress.update(task, total=most_runs(total))

        def is_good(fuel: int) -> bool:
            progress.update(task, description=f"{fuel} of {total} rewrites")
            if fuel not in trials:
                trials[fuel] = attempt(fuel)
            if trials[fuel].rewrites != fuel:
                raise MixqError(
                    f"of {total} rewrites that were made before, {trials[fuel].rewrites} were possible when "
                    f"{fuel} were allowed: a pass decides differently each time, so that no rewrite can be "
                    "told by its number."
                )
            return trials[fuel].verdict.good

        def announce(probe: Probe) -> None:
            trial = trials[probe.fuel]
            if verbose and trial.verdict.output:
                progress.console.print(trial.verdict.output.rstrip(), markup=False, soft_wrap=True)
            line = f"{trial.rewrites} of {total} rewrites: {trial.outcome} ({trial.seconds:.1f} s)"
            progress.console.print(Text(line, style="dim"), soft_wrap=True)
            progress.advance(task)

        try:
            found = bisect_fuel(total, is_good, announce)
        except (NothingBrokenError, BrokenFromTheStartError) as error:
            last = list(trials.values())[-1]
            why = last.failure or f"With {last.rewrites} rewrites: {last.outcome}."
            raise MixqError(f"{error}\n{why}") from error
    return found.first_bad, trials


def culprit_of(pipeline: Pipeline, first_bad: int, trials: dict[int, Trial]) -> Culprit:
    """What is known of the rewrite that broke it, from the runs of a search."""
    from mixq_compile.pipeline.bisection import rewrite_diff, rewrites

    before, after = trials[first_bad - 1], trials[first_bad]
    made = rewrites(pipeline, after.history)[first_bad - 1]
    return Culprit(made, max(trials), rewrite_diff(made, before.history, after.history), before, after)
