import json
import pickle

import pytest
import torch
from captures import ROUTES, TwoLayers, capture, captured_llama, linears
from hypothesis import given, settings
from hypothesis import strategies as st

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.changes import Fingerprint
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.snapshot import NodeRow, Snapshot
from mixq_compile.ops.operands import given_operands

aten = torch.ops.aten


@pytest.fixture(params=ROUTES)
def graph(request: pytest.FixtureRequest) -> CapturedGraph:
    return capture(TwoLayers(), torch.randn(2, 8), route=request.param)


def rename_and_add(graph: CapturedGraph) -> None:
    """A rewrite, an addition, an erasure and an annotation."""
    first, second = linears(graph)
    with graph.graph.inserting_before(second):
        negative = graph.call(aten.neg.default, (second.args[0],), like=second)
        graph.replace(second, graph.call(aten.linear.default, (negative, second.args[1]), like=second))
    Annotations(first).scheme = "w8a8"


class TestSnapshot:
    def test_a_row_says_what_a_reader_asks_for(self, graph: CapturedGraph) -> None:
        first = linears(graph)[0]
        Annotations(first).role = "up"
        row = Snapshot.of(graph).by_name[first.name]
        assert row.op == "call_function"
        assert row.target in ("aten.linear.default", "_C._nn.linear")
        assert row.inputs == tuple(node.name for node in first.all_input_nodes)
        assert row.value == "float32[2, 16]"
        assert row.fqn == "first"
        assert row.annotations == {"role": "up"}
        assert "self.first(x)" in row.where

    def test_a_parameter_is_named(self, graph: CapturedGraph) -> None:
        weight = linears(graph)[0].args[1]
        assert Snapshot.of(graph).by_name[weight.name].fqn == "first.weight"

    def test_its_text_is_a_program(self, graph: CapturedGraph) -> None:
        text = Snapshot.of(graph).text
        first = linears(graph)[0]
        assert f"{first.name} = " in text
        assert text.splitlines()[-1].startswith("return ")

    def test_it_outlives_and_ignores_the_graph(self, graph: CapturedGraph) -> None:
        snapshot = Snapshot.of(graph)
        text = snapshot.text
        rename_and_add(graph)
        assert snapshot.text == text
        assert pickle.loads(pickle.dumps(snapshot)) == snapshot

    def test_it_round_trips_through_json(self, graph: CapturedGraph) -> None:
        snapshot = Snapshot.of(graph)
        assert Snapshot.from_json(json.loads(json.dumps(snapshot.to_json()))) == snapshot

    def test_operators_are_counted(self, graph: CapturedGraph) -> None:
        snapshot = Snapshot.of(graph)
        assert snapshot.op_counts()[snapshot.by_name[linears(graph)[0].name].target] == 2

    def test_an_update_equals_a_new_snapshot(self, graph: CapturedGraph) -> None:
        before, fingerprint = Snapshot.of(graph), Fingerprint(graph)
        rename_and_add(graph)
        changes = fingerprint.changes(graph)
        assert before.updated(graph, {*changes.created, *changes.changed}) == Snapshot.of(graph)


class TestFingerprint:
    def test_an_untouched_graph_has_no_changes(self, graph: CapturedGraph) -> None:
        fingerprint = Fingerprint(graph)
        list(graph.walk())
        Snapshot.of(graph)
        assert not fingerprint.changes(graph)

    def test_every_kind_of_change_is_seen(self, graph: CapturedGraph) -> None:
        fingerprint = Fingerprint(graph)
        first, second = linears(graph)
        rename_and_add(graph)
        changes = fingerprint.changes(graph)
        assert [node.target for node in changes.created] == [aten.neg.default, aten.linear.default]
        assert first in changes.changed
        assert changes.erased == 1
        assert not changes.moved
        assert set(changes.created) < set(changes.touched())
        assert second not in changes.touched()

    def test_readers_of_a_changed_node_are_touched(self, graph: CapturedGraph) -> None:
        fingerprint = Fingerprint(graph)
        first = linears(graph)[0]
        graph.set_value(first, graph.value(first).clone())
        assert fingerprint.changes(graph).touched() == [first, *first.users]

    def test_a_move_is_seen(self, graph: CapturedGraph) -> None:
        one, other = graph.attach("one", torch.zeros(1)), graph.attach("other", torch.zeros(1))
        fingerprint = Fingerprint(graph)
        other.append(one)
        changes = fingerprint.changes(graph)
        assert changes.moved
        assert not changes.changed


def row(name: str, target: str = "op") -> NodeRow:
    return NodeRow(name, "call_function", target, "", (), "", "", "")


rows = st.lists(
    st.tuples(st.sampled_from("abcdefghij"), st.sampled_from(["op", "other"])), unique_by=lambda pair: pair[0]
)
snapshots = rows.map(lambda pairs: Snapshot(tuple(row(name, target) for name, target in pairs)))


class TestDiff:
    @settings(deadline=None, max_examples=60)
    @given(snapshots)
    def test_a_snapshot_does_not_differ_from_itself(self, snapshot: Snapshot) -> None:
        assert not GraphDiff.between(snapshot, snapshot)

    @settings(deadline=None, max_examples=60)
    @given(snapshots, snapshots)
    def test_applied_to_the_first_it_gives_the_second(self, before: Snapshot, after: Snapshot) -> None:
        assert GraphDiff.between(before, after).apply(before) == after

    @settings(deadline=None, max_examples=60)
    @given(snapshots, snapshots)
    def test_it_is_empty_only_for_equal_snapshots(self, before: Snapshot, after: Snapshot) -> None:
        assert bool(GraphDiff.between(before, after)) == (before != after)

    @settings(deadline=None, max_examples=60)
    @given(snapshots, snapshots)
    def test_it_round_trips_through_json(self, before: Snapshot, after: Snapshot) -> None:
        diff = GraphDiff.between(before, after)
        assert GraphDiff.from_json(json.loads(json.dumps(diff.to_json()))) == diff

    @settings(deadline=None, max_examples=60)
    @given(snapshots, snapshots)
    def test_operator_counts_add_up(self, before: Snapshot, after: Snapshot) -> None:
        counts = GraphDiff.between(before, after).op_counts
        for target in ("op", "other"):
            grown = after.op_counts().get(target, 0) - before.op_counts().get(target, 0)
            assert counts.get(target, 0) == grown

    def test_a_move_moves_no_more_than_it_must(self) -> None:
        before = Snapshot(tuple(map(row, "abcdef")))
        after = Snapshot(tuple(map(row, "bcdaef")))
        assert GraphDiff.between(before, after).moved == ("a",)

    def test_it_names_the_layers_it_touches(self, graph: CapturedGraph) -> None:
        before = Snapshot.of(graph)
        rename_and_add(graph)
        diff = GraphDiff.between(before, Snapshot.of(graph))
        assert diff.apply(before) == Snapshot.of(graph)
        assert {row.name for row in diff.removed} == {"linear_1"} or graph.origin == "dynamo"
        assert set(diff.touched_fqns()) >= {"first", "second"}


def test_a_llamas_snapshot_has_every_node() -> None:
    for graph in map(captured_llama, ROUTES):
        snapshot = Snapshot.of(graph)
        assert len(snapshot.rows) == len(graph.graph.nodes)
        assert all(row.value for row in snapshot.rows if row.target == "aten.linear.default")


class TestOperandsOfAPrintedCall:
    """A view reads operands by name too; the text is all that it has."""

    def row(self, target: str, args: str) -> NodeRow:
        return NodeRow("n", "call_function", target, args, (), "", "", "")

    def test_each_operand_has_its_name(self) -> None:
        row = self.row("aten.linear.default", "%x, %w, bias=%b")
        assert row.operands == {"input": "%x", "weight": "%w", "bias": "%b"}

    def test_commas_within_lists_and_texts_divide_nothing(self) -> None:
        text = "%q, %i, %c, [%a, %b], [], [%d], [(1, 2), %e], [%f], 0, 'a, \\'b'"
        row = self.row("mixq.refresh_outlier_weights.default", text)
        assert row.operands["cached_index"] == "[%a, %b]"
        assert row.operands["outlier_weight"] == "[]"
        assert row.operands["weight_scale"] == "[(1, 2), %e]"
        assert row.operands["kernel"] == "'a, \\'b'"

    def test_what_a_recorded_graph_prints_is_read_back(self) -> None:
        graph = capture(TwoLayers(), torch.randn(2, 8), route="export")
        for node in linears(graph):
            row = Snapshot.of(graph).by_name[node.name]
            expected = {name: f"%{given.name}" for name, given in given_operands(node).items()}
            assert row.operands == expected

    @pytest.mark.parametrize("target", ["_C._nn.linear", "getitem", "mixq.no_such.default", "a.b.c"])
    def test_a_target_without_a_schema_names_nothing(self, target: str) -> None:
        row = self.row(target, "%x, 1")
        assert row.operands == {}
        assert row.arguments == ("%x", "1")
