"""Which rewrite broke a model: binary search over fuel, and what the rewrite of a number is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mixq_compile.errors import PipelineError
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.pipeline.history import History
from mixq_compile.pipeline.passes import Decision
from mixq_compile.pipeline.pipeline import Pipeline


class NothingBrokenError(PipelineError):
    """All rewrites together are good, so that none of them can be to blame."""


class BrokenFromTheStartError(PipelineError):
    """The result is bad without any rewrite, so that none of them can be to blame."""


@dataclass(frozen=True)
class Probe:
    """The verdict on one number of rewrites."""

    fuel: int
    good: bool


@dataclass(frozen=True)
class Bisection:
    """What a search found: with `first_bad - 1` rewrites the result is good, with `first_bad` it is not."""

    first_bad: int
    """The number of the rewrite that broke it, from 1."""
    probes: tuple[Probe, ...]
    """Every number that was tested, in order; none twice."""


def bisect_fuel(
    total: int, is_good: Callable[[int], bool], announce: Callable[[Probe], None] = lambda probe: None
) -> Bisection:
    """Finds the rewrite that turns a good result into a bad one.

    Args:
        total: how many rewrites there are.
        is_good: the verdict on a run with so many rewrites; asked at most log2(total) + 2 times, rounded up.
        announce: told each verdict as it is known.

    Raises NothingBrokenError where all rewrites are good, BrokenFromTheStartError where none is already
    bad. Where good and bad alternate, it finds one of the places where good turns into bad.
    """
    probes: list[Probe] = []

    def test(fuel: int) -> bool:
        probes.append(Probe(fuel, is_good(fuel)))
        announce(probes[-1])
        return probes[-1].good

    if test(total):
        raise NothingBrokenError(f"with all {total} rewrites the result is good: there is nothing to find.")
    if total == 0 or not test(0):
        raise BrokenFromTheStartError(
            "without any rewrite the result is bad already: no rewrite is to blame. The check may reject the "
            "model itself, or a pass fail before it rewrites anything."
        )
    good, bad = 0, total
    while bad - good > 1:
        middle = (good + bad) // 2
        if test(middle):
            good = middle
        else:
            bad = middle
    return Bisection(bad, tuple(probes))


def most_runs(total: int) -> int:
    """How many numbers `bisect_fuel` tests at most."""
    return max(total - 1, 0).bit_length() + 2


@dataclass(frozen=True)
class Rewrite:
    """One rewrite of a run: what a unit of fuel paid for."""

    number: int
    """Its place among the rewrites of all passes, from 1: the fuel that it takes to get there."""
    index: int
    """The place of its pass in the pipeline, from 1."""
    spec: str
    """The pass, as the pipeline writes it."""
    decision: Decision

    def lines(self) -> list[str]:
        """Pass, decision, node, layer and Python line, a line each."""
        parts = (
            ("pass", f"{self.index}, {self.spec}"),
            ("decision", self.decision.reason),
            ("node", self.decision.node),
            ("layer", self.decision.fqn),
            ("python", self.decision.where),
        )
        return [f"  {name}: {text}" for name, text in parts if text]


def rewrites(pipeline: Pipeline, history: History) -> list[Rewrite]:
    """What each unit of fuel paid for in a run of the pipeline, in order; the run may have failed."""
    found: list[Rewrite] = []
    for step, record in zip(pipeline.passes, history.records, strict=False):
        for decision in record.decisions:
            if step.spends_fuel and decision.verdict == "applied":
                found.append(Rewrite(len(found) + 1, record.index, record.spec, decision))
    return found


def rewrite_diff(rewrite: Rewrite, before: History, after: History) -> GraphDiff | None:
    """What the rewrite changed, from runs with one unit of fuel too little and with just enough.

    Compares the graphs behind its own pass, so that what later passes make of it is left out. None where
    the pass failed in one of the runs, or did not come to pass: then there is no graph to compare.
    """
    for history in (before, after):
        if len(history.records) < rewrite.index or history.records[rewrite.index - 1].diff is None:
            return None
    return GraphDiff.between(before.snapshot(rewrite.index), after.snapshot(rewrite.index))
