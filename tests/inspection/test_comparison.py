import dataclasses
import functools
import io
import json
import re
import time

import pytest
import torch
from captures import ROUTES, capture
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mixq_compile import ops  # noqa: F401  # defines torch.ops.mixq
from mixq_compile.errors import OptionError
from mixq_compile.inspection.comparison import GraphComparison, InspectionComparison, compare
from mixq_compile.inspection.comparison_text import print_comparison
from mixq_compile.inspection.inspection import InspectedGraph, Inspection
from mixq_compile.inspection.layers import LayerSummary
from mixq_compile.inspection.node_matching import match_nodes, renamed_like
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.snapshot import NodeRow, Snapshot
from mixq_compile.pipeline import History, PassContext, Pipeline
from mixq_compile.runtime.weight_store import WeightStore

WIDTH = 32
FORCED = "strip-guards,canonicalize-linear,select-scheme{force=true},rewrite-mixed-linear"


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(torch.nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(blocks))
        self.head = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def inspect(pipeline: str = FORCED, blocks: int = 2, route: str = "export", rows: int = 4) -> Inspection:
    """A new capture of a new model, and what a pipeline makes of it."""
    torch.manual_seed(0)
    graph = capture(Stack(blocks), torch.randn(rows, WIDTH), route=route)
    history = Pipeline.parse(pipeline).run(graph, PassContext(weights=WeightStore()))
    return Inspection("stack", f"x float32[{rows}, {WIDTH}]", (InspectedGraph.of(history),))


@functools.cache
def inspected(pipeline: str = FORCED, blocks: int = 2) -> Inspection:
    """The same for tests that only read it."""
    return inspect(pipeline, blocks)


def compared(before: Inspection, after: Inspection, fqn: str | None = None) -> GraphComparison:
    (graph,) = compare(before, after, fqn).graphs
    return graph


def of_rows(*rows: NodeRow, name: str = "") -> Inspection:
    """An inspection of one graph without passes."""
    return Inspection("rows", "", (InspectedGraph.of(History("", Snapshot(rows)), name),))


def with_layers(inspection: Inspection, **changes: object) -> Inspection:
    """The inspection with other facts about each of its layers."""
    graphs = tuple(
        dataclasses.replace(
            graph, layers=tuple(dataclasses.replace(layer, **changes) for layer in graph.layers)
        )
        for graph in inspection.graphs
    )
    return dataclasses.replace(inspection, graphs=graphs)


def row(name: str, target: str = "relu", *inputs: str, fqn: str = "", **changes: object) -> NodeRow:
    op = "placeholder" if target == "input" else "call_function"
    args = ", ".join(f"%{source}" for source in inputs)
    made = NodeRow(name, op, name if op == "placeholder" else target, args, inputs, "float32[4]", fqn, "")
    return dataclasses.replace(made, **changes)


def printed(comparison: InspectionComparison, lines: int = 40) -> str:
    console = Console(file=io.StringIO(), width=140, color_system=None)
    print_comparison(comparison, console, lines=lines)
    return console.file.getvalue()


class TestNoDifference:
    def test_of_an_inspection_and_itself(self) -> None:
        assert not compare(inspected(), inspected())

    def test_of_an_inspection_and_what_was_saved_of_it(self) -> None:
        saved = Inspection.from_json(json.loads(json.dumps(inspected().to_json())))
        assert not compare(inspected(), saved)

    @pytest.mark.parametrize("route", ROUTES)
    def test_of_two_captures_of_one_model(self, route: str) -> None:
        comparison = compare(inspect(route=route), inspect(route=route))
        assert not comparison, comparison.graphs[0].nodes

    def test_of_a_pass_that_does_nothing_here(self) -> None:
        comparison = compare(inspected(), inspected(f"{FORCED},verify"))
        assert not comparison
        (change,) = comparison.graphs[0].passes
        assert change.before is None
        assert change.after is not None
        assert change.after.spec == "verify"

    def test_times_and_releases_are_none(self) -> None:
        (graph,) = inspected().graphs
        records = [dataclasses.replace(record, milliseconds=1e6) for record in graph.history.records]
        slow = dataclasses.replace(graph, history=dataclasses.replace(graph.history, records=records))
        other = dataclasses.replace(inspected(), graphs=(slow,), seconds={"capture": 9.0}, release="9.9")
        comparison = compare(inspected(), other)
        assert not comparison
        assert not comparison.graphs[0].passes

    def test_names_of_nodes_are_none(self) -> None:
        before = of_rows(row("x", "input"), row("linear_3", "linear", "x"), row("out", "relu", "linear_3"))
        after = of_rows(row("x", "input"), row("linear_5", "linear", "x"), row("out", "relu", "linear_5"))
        assert not compare(before, after)

    def test_python_lines_and_the_passes_that_made_a_node_are_none(self) -> None:
        notes = {"origin": ["one"], "readers": ["linear_3"], "kernel": "cpu"}
        before = of_rows(row("a", where="line 1", annotations=notes))
        after = of_rows(row("a", where="line 2", annotations={**notes, "origin": ["two"], "readers": []}))
        assert not compare(before, after)

    def test_speedups_that_a_reason_quotes_are_none(self) -> None:
        before, after = ({"skip": f"not faster with cpu: {ratio}x at 128 rows"} for ratio in ("0.63", "0.7"))
        assert not compare(of_rows(row("a", annotations=before)), of_rows(row("a", annotations=after)))
        assert not compare(with_layers(inspected(), **before), with_layers(inspected(), **after))

    def test_where_a_graph_keeps_a_parameter_is_none(self) -> None:
        before, after = (
            row(f"scale_{number}", op="get_attr", target=f"scale_{number}", fqn="up.weight.scale")
            for number in (1, 2)
        )
        assert not compare(of_rows(before), of_rows(after))


class TestNodes:
    def test_a_new_scheme_changes_the_nodes_of_its_layers_only(self) -> None:
        other = FORCED.replace("{force=true}", "{force=true layers=up=w4a8o16}")
        graph = compared(inspected(), inspected(other))
        assert not graph.nodes.added
        assert not graph.nodes.removed
        assert graph.nodes.changed
        touched = {fqn.split(".")[2] for fqn in graph.nodes.touched_fqns()}
        assert touched == {"up"}, "nodes of other layers are shown as changed"
        assert [change.fqn for change in graph.layers] == ["blocks.0.up", "blocks.1.up"]
        assert {"scheme", "weight_bits", "bytes_after"} <= set(graph.layers[0].differing)

    def test_a_new_layer_is_added_and_its_reader_alone_changes(self) -> None:
        graph = compared(inspected("canonicalize-linear", 2), inspected("canonicalize-linear", 3))
        assert all(row.fqn.startswith("blocks.2") for row in graph.nodes.added if row.fqn)
        assert not graph.nodes.removed
        assert [new.fqn for _, new in graph.nodes.changed] == ["head"]
        assert [change.fqn for change in graph.layers] == ["blocks.2.up", "blocks.2.down"]
        assert all(change.before is None for change in graph.layers)
        assert graph.op_counts["aten.linear.default"] == (5, 7)

    def test_the_other_way_round_it_is_removed(self) -> None:
        graph = compared(inspected("canonicalize-linear", 3), inspected("canonicalize-linear", 2))
        assert not graph.nodes.added
        assert [change.fqn for change in graph.layers] == ["blocks.2.up", "blocks.2.down"]
        assert all(change.after is None for change in graph.layers)

    def test_readers_of_a_replaced_operator_do_not_change(self) -> None:
        before = of_rows(row("x", "input"), row("a", "linear", "x", fqn="up"), row("out", "relu", "a"))
        after = of_rows(row("x", "input"), row("b", "mixed", "x", fqn="up"), row("out", "relu", "b"))
        nodes = compared(before, after).nodes
        assert [(old.name, new.target) for old, new in nodes.changed] == [("a", "mixed")]
        assert not nodes.added
        assert not nodes.removed

    def test_nor_do_readers_of_replaced_operators_in_a_row(self) -> None:
        before = of_rows(
            row("a", "linear", fqn="up"), row("b", "relu", "a", fqn="up"), row("out", "neg", "b")
        )
        after = of_rows(row("c", "mixed", fqn="up"), row("d", "gelu", "c", fqn="up"), row("out", "neg", "d"))
        nodes = compared(before, after).nodes
        assert [(old.name, new.target) for old, new in nodes.changed] == [("a", "mixed"), ("b", "gelu")]
        assert not nodes.added

    def twins(self) -> list[NodeRow]:
        """Three chains in three modules; their second nodes belong to none and look the same."""
        rows = [row("x", "input")]
        for role in ("query", "key", "value"):
            rows += [row(f"{role}_in", "linear", "x", fqn=role), row(f"{role}_t", "transpose", f"{role}_in")]
        return [*rows, row("out", "attention", "query_t", "key_t", "value_t")]

    def test_a_new_operator_is_told_from_its_twins(self) -> None:
        after = self.twins()
        after[4:5] = [row("new", "neg", "key_in"), row("key_t", "transpose", "new")]
        nodes = compared(of_rows(*self.twins()), of_rows(*after)).nodes
        assert [row.target for row in nodes.added] == ["neg"]
        assert [new.name for _, new in nodes.changed] == ["key_t"]
        assert not nodes.moved

    def test_an_operator_that_is_gone_is_told_from_its_twins(self) -> None:
        after = self.twins()
        del after[2]
        after[-1] = row("out", "attention", "query_in", "key_t", "value_t")
        nodes = compared(of_rows(*self.twins()), of_rows(*after)).nodes
        assert [row.name for row in nodes.removed] == ["query_t"]
        assert [new.name for _, new in nodes.changed] == ["out"]

    def test_what_reads_an_operator_tells_it_from_its_twins(self) -> None:
        rows = [
            row("a", "ones"),
            row("b", "ones"),
            row("c", "neg", "a", fqn="up"),
            row("d", "neg", "b", fqn="down"),
        ]
        nodes = compared(of_rows(*rows), of_rows(rows[1], rows[3])).nodes
        assert [row.name for row in nodes.removed] == ["a", "c"]
        assert not nodes.changed

    def test_a_number_among_the_arguments_is_a_change(self) -> None:
        before, after = (row("a", "slice", args=f"{number}") for number in (1, 2))
        (change,) = compared(of_rows(before), of_rows(after)).nodes.changed
        assert [each.args for each in change] == ["1", "2"]

    def test_a_new_node_never_takes_a_name_that_is_in_use(self) -> None:
        before = of_rows(row("a", "one"), row("a_b", "two"))
        after = of_rows(row("a", "two"), row("a_b", "three"))
        nodes = compared(before, after).nodes
        assert [row.name for row in nodes.removed] == ["a"]
        assert [(row.name, row.target) for row in nodes.added] == [("a_b_b", "three")]

    def test_another_number_of_rows_is_a_difference_of_values_alone(self) -> None:
        nodes = compared(inspect(), inspect(rows=8)).nodes
        assert not nodes.added
        assert not nodes.removed
        assert all(old.args == new.args for old, new in nodes.changed)


class TestGraphs:
    def test_are_paired_by_name_then_by_position(self) -> None:
        def graphs(*names: str) -> Inspection:
            made = tuple(of_rows(row("a", fqn=name), name=name).graphs[0] for name in names)
            return Inspection("", "", made)

        pairs = compare(graphs("0", "1", "2"), graphs("1", "3", "0", "4")).graphs
        assert [graph.name for graph in pairs] == ["0", "1", "2", "4"]
        assert [bool(graph) for graph in pairs] == [False, False, True, True]

    def test_a_graph_of_one_side_alone_is_all_new(self) -> None:
        empty = Inspection("", "", ())
        graph = compared(empty, inspected())
        assert len(graph.nodes.added) == len(inspected().graphs[0].history.final.rows)
        assert not compare(empty, empty)

    def test_a_run_without_snapshots_cannot_be_compared(self) -> None:
        nothing = Inspection("", "", (InspectedGraph.of(History("aot", None)),))
        with pytest.raises(OptionError, match="took no snapshots"):
            compare(inspected(), nothing)


class TestLayers:
    def changed(self, **changes: object) -> GraphComparison:
        before = with_layers(inspected(), sqnr_db=40.0, found_columns=3)
        return compared(before, with_layers(before, **changes))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("kernel", "other"),
            ("capacity", 64),
            ("bytes_after", 1),
            ("skip", "why"),
            ("calibrated_columns", 7),
        ],
    )
    def test_a_fact_of_the_program_is_a_difference(self, name: str, value: object) -> None:
        graph = self.changed(**{name: value})
        assert graph
        assert all(change.differing == (name,) for change in graph.layers)

    def test_noise_of_an_error_is_not_mentioned(self) -> None:
        assert not self.changed(sqnr_db=40.3).layers

    @pytest.mark.parametrize("changes", [{"sqnr_db": 20.0}, {"found_columns": 5}])
    def test_what_was_measured_is_mentioned_and_no_difference(self, changes: dict[str, float]) -> None:
        graph = self.changed(**changes)
        assert len(graph.layers) == 5
        assert not graph
        assert (graph.layers[0].sqnr_change, graph.layers[0].found_change) in ((-20.0, 0), (0.0, 2))

    def test_what_only_one_side_measured_is_not_mentioned(self) -> None:
        assert not self.changed(sqnr_db=None, found_columns=None).layers

    def test_expected_times_of_another_device_are_not_mentioned(self) -> None:
        assert not self.changed(costs={"1": {"microseconds": {"after": 1.0}}}).layers


class TestPattern:
    def test_chooses_layers_with_all_that_belongs_to_them(self) -> None:
        other = inspected(FORCED.replace("force=true", "force=true default=w4a8o16"))
        graph = compared(inspected(), other, "blocks.*.up")
        assert graph.layer_counts == (2, 2)
        assert {row.fqn.split(".")[2] for row in graph.after.rows} == {"up"}
        assert any(new.fqn.endswith("up.weight.codes") for _, new in graph.nodes.changed)

    def test_leaves_differences_of_others_out(self) -> None:
        other = inspected(FORCED.replace("{force=true}", "{force=true layers=up=w4a8o16}"))
        assert compare(inspected(), other, "up")
        assert not compare(inspected(), other, "down")

    def test_that_fits_nothing_names_the_nearest(self) -> None:
        with pytest.raises(OptionError, match=r"unknown layer 'dwon'. Did you mean 'down'"):
            compare(inspected(), inspected(), "dwon")


# A random program: each node reads some of those before it.
@st.composite
def programs(draw: st.DrawFn, smallest: int = 0) -> Snapshot:
    rows: list[NodeRow] = []
    for number in range(draw(st.integers(smallest, 8))):
        known = [each.name for each in rows]
        inputs = draw(st.lists(st.sampled_from(known), max_size=2, unique=True)) if known else []
        target = draw(st.sampled_from(["add", "mul", "input"]))
        fqn = draw(st.sampled_from(["", "up", "down"]))
        rows.append(row(f"n_{number}", target, *([] if target == "input" else inputs), fqn=fqn))
    return Snapshot(tuple(rows))


def renamed(snapshot: Snapshot, names: dict[str, str]) -> Snapshot:
    def change(each: NodeRow) -> NodeRow:
        inputs = tuple(names[source] for source in each.inputs)
        args = re.sub(r"%(\w+)", lambda match: f"%{names[match[1]]}", each.args)
        return dataclasses.replace(each, name=names[each.name], inputs=inputs, args=args)

    return Snapshot(tuple(map(change, snapshot.rows)))


class TestMatching:
    @settings(deadline=None, max_examples=100)
    @given(programs(), programs())
    def test_never_pairs_a_node_twice(self, before: Snapshot, after: Snapshot) -> None:
        found = match_nodes(before, after)
        assert len(set(found.values())) == len(found)
        assert set(found) <= set(after.by_name)
        assert set(found.values()) <= set(before.by_name)

    @settings(deadline=None, max_examples=100)
    @given(programs(), programs())
    def test_pairs_nodes_of_one_module_only(self, before: Snapshot, after: Snapshot) -> None:
        for new, old in match_nodes(before, after).items():
            assert before.by_name[old].fqn == after.by_name[new].fqn

    @settings(deadline=None, max_examples=100)
    @given(programs(), programs())
    def test_the_difference_applied_to_the_first_gives_the_second(
        self, before: Snapshot, after: Snapshot
    ) -> None:
        like = renamed_like(before, after)
        assert len(like.by_name) == len(after.rows), "two nodes share a name"
        assert GraphDiff.between(before, like).apply(before) == like

    @settings(deadline=None, max_examples=100)
    @given(programs(), st.randoms(use_true_random=False))
    def test_new_names_are_no_difference(self, snapshot: Snapshot, random: object) -> None:
        names = [each.name for each in snapshot.rows]
        shuffled = list(names)
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        assert renamed_like(snapshot, renamed(snapshot, dict(zip(names, shuffled, strict=True)))) == snapshot

    @settings(deadline=None, max_examples=100)
    @given(programs(smallest=1), st.data())
    def test_one_new_node_is_all_that_is_added(self, snapshot: Snapshot, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(snapshot.rows)))
        rows = list(snapshot.rows)
        rows.insert(place, row("n_new", "new"))
        diff = GraphDiff.between(snapshot, renamed_like(snapshot, Snapshot(tuple(rows))))
        assert [each.target for each in diff.added] == ["new"]
        assert (diff.removed, diff.changed, diff.moved) == ((), (), ())

    @settings(deadline=None, max_examples=100)
    @given(programs(smallest=1), st.data())
    def test_one_changed_argument_is_one_changed_node(self, snapshot: Snapshot, data: st.DataObject) -> None:
        rows = [dataclasses.replace(each, fqn=each.name) for each in snapshot.rows]
        before = Snapshot(tuple(rows))
        place = data.draw(st.integers(0, len(rows) - 1))
        rows[place] = dataclasses.replace(rows[place], args=f"{rows[place].args}, 7")
        after = renamed(Snapshot(tuple(rows)), {each.name: f"m{each.name}" for each in rows})
        diff = GraphDiff.between(before, renamed_like(before, after))
        assert [old.name for old, _ in diff.changed] == [rows[place].name]
        assert (diff.added, diff.removed, diff.moved) == ((), (), ())

    def test_a_thousand_layers_take_a_moment(self) -> None:
        rows = [row("n_0", "input")]
        for number in range(1, 4000):
            rows.append(row(f"n_{number}", "add", f"n_{number - 1}", fqn=f"layers.{number // 4}"))
        snapshot = Snapshot(tuple(rows))
        begin = time.process_time()
        assert renamed_like(snapshot, snapshot) == snapshot
        assert time.process_time() - begin < 2


class TestJson:
    def test_says_what_differs(self) -> None:
        other = inspected(FORCED.replace("force=true", "force=true default=w4a8o16"))
        data = json.loads(json.dumps(compare(inspected(), other).to_json()))
        assert (data["format"], data["differs"]) == ("mixq-comparison", True)
        (graph,) = data["graphs"]
        assert GraphDiff.from_json(graph["nodes"]) == compared(inspected(), other).nodes
        assert graph["layers"][0]["before"]["scheme"] == "w8a8o16"
        assert graph["layers"][0]["after"]["scheme"] == "w4a8o16"
        assert [change["after"]["spec"] for change in graph["passes"]] == [
            "select-scheme{default=w4a8o16 force=true}"
        ]

    def test_says_that_nothing_does(self) -> None:
        data = compare(inspected(), inspected()).to_json()
        assert not data["differs"]
        assert data["graphs"][0]["layers"] == []


class TestText:
    def test_nothing_is_one_line(self) -> None:
        count = len(inspected().graphs[0].history.final.rows)
        assert printed(compare(inspected(), inspected())) == f"no difference: {count} nodes, 5 layers\n"

    def test_passes_that_made_the_same_are_named(self) -> None:
        shown = printed(compare(inspected(), inspected(f"{FORCED},verify")))
        assert "no difference" in shown.splitlines()[0]
        assert "+ 5 verify" in shown

    def test_layers_that_differ_alike_share_a_row(self) -> None:
        other = FORCED.replace("{force=true}", "{force=true layers=up=w4a8o16}")
        shown = printed(compare(inspected(), inspected(other)))
        (line,) = (line for line in shown.splitlines() if "~ blocks.*.up ×2" in line)
        assert "w8a8o16 → w4a8o16" in line
        assert "down" not in shown, "layers and nodes without a difference are shown"

    def test_only_columns_that_differ_are_shown(self) -> None:
        before = inspected()
        shown = printed(compare(before, with_layers(before, kernel="other")))
        (headings,) = (line.split() for line in shown.splitlines() if line.split()[:1] == ["layer"])
        assert headings == ["layer", "kernel"]

    def test_figures_of_a_row_are_a_range(self) -> None:
        (graph,) = inspected().graphs
        layers = [dataclasses.replace(layer, sqnr_db=40.0 + n) for n, layer in enumerate(graph.layers)]
        before = dataclasses.replace(inspected(), graphs=(dataclasses.replace(graph, layers=tuple(layers)),))
        shown = printed(compare(before, with_layers(before, sqnr_db=20.0)))
        assert "40.0…42.0 → 20.0" in shown

    def test_operators_are_counted(self) -> None:
        shown = printed(compare(inspected("canonicalize-linear", 3), inspected("canonicalize-linear", 2)))
        assert "  aten.linear.default 7 → 5 (−2)" in shown.splitlines()
        assert "- blocks.2.up" in shown

    def test_nodes_are_a_patch_by_layer(self) -> None:
        before = of_rows(row("a", "one", fqn="up"), row("b", "two", fqn="up", annotations={"kernel": "cpu"}))
        after = of_rows(row("a", "one", fqn="up", args="7"), row("b", "two", fqn="up", annotations={}))
        lines = printed(compare(before, after)).splitlines()
        assert lines[lines.index("@@ up") :] == [
            "@@ up",
            "- a = operator.one()  # float32[4]",
            "+ a = operator.one(7)  # float32[4]",
            "~ b = operator.two()  # kernel cpu → –",
        ]

    @pytest.mark.parametrize("limit", [0, 3])
    def test_the_patch_is_limited_and_says_so(self, limit: int) -> None:
        comparison = compare(inspected("canonicalize-linear"), inspected())
        whole = printed(comparison, lines=10_000).splitlines()
        shown = printed(comparison, lines=limit).splitlines()
        left = len(whole) - len(shown) + 1
        assert shown[:-1] == whole[: len(shown) - 1]
        assert shown[-1] == f"… {left} more lines: --lines {left + limit} shows all"

    def test_a_patch_within_the_limit_is_whole(self) -> None:
        comparison = compare(of_rows(), of_rows(row("a", fqn="up")))
        assert printed(comparison, lines=2).splitlines()[-1].startswith("+ a")
        assert "… 1 more line: --lines 2 shows all" in printed(comparison, lines=1)

    def test_notes_and_releases_are_told(self) -> None:
        other = dataclasses.replace(inspected(blocks=3), notes=("no [weights]",), release="9.9")
        shown = printed(compare(inspected(), other))
        assert "note: no [weights]" in shown
        assert "by mixq-compile 9.9" in shown


def test_every_field_of_a_layer_is_either_program_or_not() -> None:
    """A new field counts as a difference unless `NO_PROGRAM` says otherwise: look at it when this fails."""
    assert {field.name for field in dataclasses.fields(LayerSummary)} == {
        "fqn", "role", "out_features", "in_features", "dtype", "scheme", "weight_bits", "activation_bits",
        "kernel", "skip", "where", "bytes_before", "bytes_after", "capacity", "calibrated_columns",
        "found_columns", "sqnr_db", "weights_db", "inputs_db", "left_out", "costs", "area", "recipe",
    }  # fmt: skip
