from math import ceil, log2

import pytest
import torch
from captures import TwoLayers, capture
from hypothesis import given
from hypothesis import strategies as st
from throwaway_passes import REGISTRY

from mixq_compile.pipeline import Fuel, History, PassContext, PassError, Pipeline
from mixq_compile.pipeline.bisection import (
    BrokenFromTheStartError,
    NothingBrokenError,
    Probe,
    bisect_fuel,
    most_runs,
    rewrite_diff,
    rewrites,
)


def run(text: str, fuel: int | None = None) -> tuple[Pipeline, History]:
    """A run over two linears, `first` and `second`."""
    pipeline = Pipeline.parse(text, REGISTRY)
    graph = capture(TwoLayers(), torch.randn(2, 8), route="export")
    try:
        return pipeline, pipeline.run(graph, PassContext(fuel=Fuel(fuel)))
    except PassError as error:
        return pipeline, error.history


class TestSearch:
    @given(st.data())
    def test_finds_the_first_bad_rewrite_in_few_runs(self, data: st.DataObject) -> None:
        total = data.draw(st.integers(1, 5000))
        first_bad = data.draw(st.integers(1, total))
        asked: list[int] = []

        def is_good(fuel: int) -> bool:
            asked.append(fuel)
            return fuel < first_bad

        found = bisect_fuel(total, is_good)
        assert found.first_bad == first_bad
        assert len(asked) <= ceil(log2(total)) + 2 == most_runs(total)
        assert len(set(asked)) == len(asked)
        assert [probe.fuel for probe in found.probes] == asked

    @given(st.lists(st.booleans(), min_size=1, max_size=60))
    def test_finds_one_place_where_good_turns_into_bad(self, middle: list[bool]) -> None:
        verdicts = [True, *middle, False]
        first_bad = bisect_fuel(len(verdicts) - 1, verdicts.__getitem__).first_bad
        assert verdicts[first_bad - 1 : first_bad + 1] == [True, False]

    def test_tells_each_verdict_as_it_is_known(self) -> None:
        told: list[Probe] = []
        found = bisect_fuel(8, lambda fuel: fuel < 3, told.append)
        assert told == list(found.probes)
        assert told == [Probe(8, False), Probe(0, True), Probe(4, False), Probe(2, True), Probe(3, False)]

    def test_nothing_to_find_takes_one_run(self) -> None:
        asked: list[int] = []
        with pytest.raises(NothingBrokenError, match="with all 7 rewrites the result is good"):
            bisect_fuel(7, lambda fuel: not asked.append(fuel))
        assert asked == [7]

    @pytest.mark.parametrize("total", [0, 7])
    def test_what_is_bad_without_rewrites_is_no_rewrites_fault(self, total: int) -> None:
        with pytest.raises(BrokenFromTheStartError, match="without any rewrite the result is bad already"):
            bisect_fuel(total, lambda fuel: False)


class TestRewrites:
    def test_each_unit_of_fuel_has_its_decision(self) -> None:
        made = rewrites(*run("annotate-linears,negate-twice"))
        assert [(one.number, one.index, one.decision.reason) for one in made] == [
            (1, 1, "scheme w8a8o16"),
            (2, 1, "scheme w8a8o16"),
            (3, 2, "negated twice"),
            (4, 2, "negated twice"),
        ]
        assert [one.decision.fqn for one in made] == ["first", "second", "first", "second"]

    def test_fuel_gives_the_first_of_them(self) -> None:
        text = "annotate-linears,negate-twice"
        assert rewrites(*run(text, fuel=3)) == rewrites(*run(text))[:3]

    def test_what_is_skipped_or_costs_no_fuel_is_no_rewrite(self) -> None:
        made = rewrites(*run("annotate-linears{ignore=first},negate-twice,lower-negations"))
        assert [one.spec for one in made] == ["annotate-linears{ignore=first}", *["negate-twice"] * 2]

    def test_a_failed_run_has_those_up_to_its_failure(self) -> None:
        made = rewrites(*run("annotate-linears,fail-at-second,negate-twice"))
        assert [one.spec for one in made] == ["annotate-linears"] * 2

    def test_a_rewrite_in_lines(self) -> None:
        made = rewrites(*run("annotate-linears"))[0]
        first, *others = made.lines()
        assert first == "  pass: 1, annotate-linears"
        assert others[:3] == ["  decision: scheme w8a8o16", "  node: linear", "  layer: first"]
        assert "self.first(x)" in others[3]


class TestDifference:
    TEXT = "annotate-linears,negate-twice,lower-negations"

    def test_holds_the_one_rewrite_without_what_later_passes_make_of_it(self) -> None:
        (pipeline, after), (_, before) = run(self.TEXT, fuel=4), run(self.TEXT, fuel=3)
        diff = rewrite_diff(rewrites(pipeline, after)[3], before, after)
        assert diff is not None
        assert [row.target for row in diff.added] == ["aten.neg.default"] * 2
        assert {row.fqn for row in diff.added} == {"second"}

    def test_there_is_none_where_the_pass_failed(self) -> None:
        pipeline, whole = run("annotate-linears,negate-twice")
        failed = run("annotate-linears,fail-at-second")[1]
        assert rewrite_diff(rewrites(pipeline, whole)[2], whole, failed) is None

    def test_there_is_none_where_the_run_ended_before_it(self) -> None:
        pipeline, whole = run("annotate-linears,negate-twice")
        shorter = run("annotate-linears")[1]
        assert rewrite_diff(rewrites(pipeline, whole)[2], shorter, whole) is None
