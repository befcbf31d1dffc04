from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from captures import ROUTES, TwoLayers, capture, captured_llama, linears
from throwaway_passes import REGISTRY

from mixq_compile.errors import OptionError, PipelineError, VerificationError
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.snapshot import Snapshot
from mixq_compile.pipeline import (
    Decision,
    Fuel,
    History,
    Pass,
    PassContext,
    PassError,
    PassVerificationError,
    Pipeline,
)

aten = torch.ops.aten


@pytest.fixture(params=ROUTES)
def graph(request: pytest.FixtureRequest) -> CapturedGraph:
    return capture(TwoLayers(), torch.randn(2, 8), route=request.param)


def run(graph: CapturedGraph, text: str, context: PassContext | None = None, **options) -> History:
    return Pipeline.parse(text, REGISTRY).run(graph, context, **options)


def negations(graph: CapturedGraph) -> int:
    return len(list(graph.walk(aten.neg.default)))


class TestRecords:
    def test_each_pass_has_a_record(self, graph: CapturedGraph) -> None:
        history = run(graph, "annotate-linears{ignore=second},negate-twice")
        first, second = history.records
        assert [first.index, second.index] == [1, 2]
        assert first.spec == "annotate-linears{ignore=second}"
        assert first.milliseconds > 0
        assert [first.count(verdict) for verdict in ("applied", "skipped", "noted")] == [1, 1, 0]
        assert len(second.diff.added) == 4

    def test_snapshots_can_be_had_behind_every_pass(self, graph: CapturedGraph) -> None:
        before = Snapshot.of(graph)
        history = run(graph, "annotate-linears,negate-twice")
        assert history.initial == before
        assert history.snapshot(0) == before
        assert history.snapshot(1).op_counts() == before.op_counts()
        assert history.snapshot(2).op_counts()["aten.neg.default"] == 4
        assert history.final == Snapshot.of(graph)
        with pytest.raises(LookupError, match="passes 1 to 2"):
            history.snapshot(3)

    def test_a_pass_that_changes_nothing_has_an_empty_difference(self, graph: CapturedGraph) -> None:
        assert not run(graph, "forget-names").records[0].diff

    def test_snapshots_can_be_left_out(self, graph: CapturedGraph) -> None:
        history = run(graph, "annotate-linears,negate-twice", snapshots=False)
        assert history.initial is None
        assert [record.diff for record in history.records] == [None, None]
        assert history.records[0].count("applied") == 2
        with pytest.raises(LookupError, match="snapshots=True"):
            history.snapshot(0)

    def test_a_decision_knows_its_layer_and_line(self, graph: CapturedGraph) -> None:
        history = run(graph, "annotate-linears{ignore=second}")
        applied, skipped = history.decisions()
        assert (applied.fqn, applied.verdict, applied.reason) == ("first", "applied", "scheme w8a8o16")
        assert "self.first(x)" in applied.where
        assert skipped.details == {"options": ["second"]}
        assert history.decisions("second") == [skipped]

    def test_a_decision_without_a_name_takes_the_nodes(self, graph: CapturedGraph) -> None:
        node = linears(graph)[0]
        assert Decision.noted(node, "seen").fqn == "first"
        Annotations(node).fqn = "renamed"
        assert Decision.noted(node, "seen").fqn == "renamed"

    def test_details_must_be_json(self, graph: CapturedGraph) -> None:
        with pytest.raises(TypeError, match="details of a decision must be JSON"):
            Decision.noted(linears(graph)[0], "seen", details={"tensor": torch.zeros(1)})

    def test_new_nodes_carry_the_pass_that_made_them(self, graph: CapturedGraph) -> None:
        run(graph, "annotate-linears,negate-twice,lower-negations")
        products = list(graph.walk(aten.mul.Scalar))
        assert [Annotations(node).origin for node in products] == [["negate-twice", "lower-negations"]] * 4
        assert all(Annotations(node).origin is None for node in linears(graph))

    def test_the_module_runs_what_the_passes_wrote(self) -> None:
        model, x = TwoLayers(), torch.randn(2, 8)
        graph = capture(model, x, route="export")
        run(graph, "annotate-linears,negate-twice,lower-negations")
        torch.testing.assert_close(graph.module(x), model(x))
        assert "mul" in graph.module.code


class TestFuel:
    @pytest.mark.parametrize("rewrites", range(6))
    def test_it_stops_after_exactly_that_many_rewrites(self, rewrites: int) -> None:
        graph = capture(TwoLayers(), torch.randn(2, 8), route="export")
        fuel = Fuel(rewrites)
        history = run(graph, "annotate-linears,negate-twice", PassContext(fuel=fuel))
        named = sum(Annotations(node).fqn is not None for node in linears(graph))
        assert named + negations(graph) // 2 == min(rewrites, 4)
        assert fuel.spent == min(rewrites, 4)
        assert len([d for d in history.decisions() if d.verdict == "applied"]) == min(rewrites, 4)
        assert [record.stopped for record in history.records] == [rewrites < 2, rewrites < 4]

    def test_without_limit_nothing_stops(self, graph: CapturedGraph) -> None:
        context = PassContext()
        run(graph, "annotate-linears,negate-twice", context)
        assert context.fuel.spent == 4

    def test_a_lowering_pays_nothing(self, graph: CapturedGraph) -> None:
        run(graph, "annotate-linears,negate-twice,lower-negations", PassContext(fuel=Fuel(3)))
        assert negations(graph) == 0
        assert len(list(graph.walk(aten.mul.Scalar))) == 2

    def test_a_pass_that_is_stopped_may_tidy_up(self, graph: CapturedGraph) -> None:
        tidied: list[str] = []

        @dataclass(frozen=True)
        class Tidy(Pass):
            name: ClassVar[str] = "tidy"

            def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
                try:
                    for node in linears(graph):
                        yield Decision.applied(node, "nothing")
                finally:
                    tidied.append("done")

        Pipeline((Tidy(),)).run(graph, PassContext(fuel=Fuel(1)))
        assert tidied == ["done"]

    def test_a_graph_that_is_stopped_still_holds(self) -> None:
        for rewrites in range(5):
            graph = capture(TwoLayers(), torch.randn(2, 8), route="export")
            run(graph, "whole", PassContext(fuel=Fuel(rewrites)), verify="full")


class TestVerification:
    @pytest.mark.parametrize("verify", ["incremental", "full"])
    def test_a_pass_that_errs_is_named(self, graph: CapturedGraph, verify: str) -> None:
        with pytest.raises(PassVerificationError) as caught:
            run(graph, "annotate-linears,swap-operands", verify=verify)
        message = str(caught.value)
        assert message.startswith("pass 2, swap-operands, left a graph that does not hold (1 findings).")
        assert "layer: second" in message
        assert "self.second(hidden)" in message
        assert "records float32[2, 8], its operator gives float32[8, 2]" in message
        assert "what to do:" in message
        assert isinstance(caught.value, VerificationError)

    def test_its_error_carries_the_history_with_the_findings(self, graph: CapturedGraph) -> None:
        with pytest.raises(PassVerificationError) as caught:
            run(graph, "annotate-linears,swap-operands")
        assert [len(record.violations) for record in caught.value.history.records] == [0, 1]
        assert caught.value.record is caught.value.history.records[1]

    def test_it_can_be_turned_off(self, graph: CapturedGraph) -> None:
        run(graph, "swap-operands", verify="off")

    def test_findings_in_the_captured_graph_are_no_passs_doing(self, graph: CapturedGraph) -> None:
        first = linears(graph)[0]
        relu = next(iter(first.users))
        graph.set_value(relu, graph.value(relu).double())
        run(graph, "annotate-linears{ignore=first,second}", verify="full")

    def test_another_verification_is_refused(self, graph: CapturedGraph) -> None:
        with pytest.raises(OptionError, match="unknown verification 'all'"):
            run(graph, "annotate-linears", verify="all")

    def test_requirements_are_checked_before_anything_runs(self, graph: CapturedGraph) -> None:
        with pytest.raises(PipelineError, match="requirement"):
            run(graph, "negate-twice")
        assert negations(graph) == 0


class TestFailures:
    def test_a_failing_pass_is_named_with_node_layer_line_and_remedy(self, graph: CapturedGraph) -> None:
        with pytest.raises(PassError) as caught:
            run(graph, "annotate-linears,fail-at-second")
        lines = str(caught.value).splitlines()
        assert lines[0] == "pass 2, fail-at-second, failed."
        assert "linear" in lines[1]
        assert "float32[2, 8]" in lines[1]
        assert lines[2] == "  layer: second"
        assert "self.second(hidden)" in lines[3]
        assert lines[4] == "  why: ZeroDivisionError: scale is zero"
        assert lines[5].startswith("  what to do: ")
        assert isinstance(caught.value, PipelineError)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_its_options_are_part_of_the_name(self, graph: CapturedGraph) -> None:
        with pytest.raises(PassError, match=r"pass 1, fail-at-second\{after=0\}, failed"):
            run(graph, "fail-at-second{after=0}")

    def test_it_carries_the_history_up_to_then(self, graph: CapturedGraph) -> None:
        with pytest.raises(PassError) as caught:
            run(graph, "annotate-linears,fail-at-second")
        assert [record.spec for record in caught.value.history.records] == [
            "annotate-linears",
            "fail-at-second",
        ]
        assert [decision.reason for decision in caught.value.record.decisions] == ["looked at"]

    def test_without_walk_the_last_decision_names_the_node(self, graph: CapturedGraph) -> None:
        @dataclass(frozen=True)
        class FailsAfterDecision(Pass):
            name: ClassVar[str] = "fails-after-decision"

            def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
                for node in linears(graph):
                    yield Decision.applied(node, "about to")
                    raise KeyError("gone")

        with pytest.raises(PassError, match="layer: first"):
            Pipeline((FailsAfterDecision(),)).run(graph)

    def test_a_verification_error_of_a_pass_stays_one(self, graph: CapturedGraph) -> None:
        @dataclass(frozen=True)
        class Refuses(Pass):
            name: ClassVar[str] = "refuses"

            def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
                yield from ()
                raise VerificationError("3 findings")

        with pytest.raises(PassVerificationError, match="3 findings"):
            Pipeline((Refuses(),)).run(graph)

    def test_a_pass_must_be_a_generator(self, graph: CapturedGraph) -> None:
        with pytest.raises(PassError, match=r"NotAGenerator\.run must be a generator"):
            run(graph, "not-a-generator")

    def test_an_interrupt_is_not_a_failure(self, graph: CapturedGraph) -> None:
        @dataclass(frozen=True)
        class Interrupted(Pass):
            name: ClassVar[str] = "interrupted"

            def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
                yield from ()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Pipeline((Interrupted(),)).run(graph)


def test_a_llama_is_rewritten_and_holds() -> None:
    for route in ROUTES:
        graph = captured_llama.__wrapped__(route)
        history = run(graph, "annotate-linears,negate-twice,lower-negations", verify="full")
        assert history.records[1].diff.op_counts == {"aten.neg.default": 30}
        assert history.records[2].diff.op_counts["aten.mul.Scalar"] >= 30
        assert history.final == Snapshot.of(graph)
