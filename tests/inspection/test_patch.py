import pytest
from hypothesis import given
from hypothesis import strategies as st
from inspected_models import llama_inspection

from mixq_compile.inspection.patch import PatchLine, hunks, patch
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.snapshot import NodeRow, Snapshot
from mixq_compile.pipeline import History


def node(name: str, args: str = "") -> NodeRow:
    return NodeRow(name, "call_function", "aten.neg.default", args, (), "", "layer", "")


def snapshot(*rows: NodeRow) -> Snapshot:
    return Snapshot(rows)


def shown(before: Snapshot, after: Snapshot) -> list[str]:
    return [line.sign + line.row.name for line in patch(before, GraphDiff.between(before, after))]


def test_removed_nodes_stand_where_they_were_and_added_ones_where_they_are() -> None:
    before = snapshot(node("a"), node("b"), node("c"))
    after = snapshot(node("a"), node("x"), node("y"), node("c"))
    assert shown(before, after) == [" a", "-b", "+x", "+y", " c"]


def test_a_changed_node_is_two_lines() -> None:
    before, after = snapshot(node("a"), node("b")), snapshot(node("a"), node("b", "%a"))
    assert shown(before, after) == [" a", "-b", "+b"]


def test_a_moved_node_is_removed_and_added() -> None:
    before = snapshot(node("a"), node("b"), node("c"), node("d"))
    after = snapshot(node("b"), node("c"), node("d"), node("a"))
    assert shown(before, after) == ["-a", " b", " c", " d", "+a"]


names = st.lists(st.sampled_from("abcdefghij"), unique=True)


@given(names, names, st.sets(st.sampled_from("abcdefghij")))
def test_a_patch_holds_both_programs(old: list[str], new: list[str], changed: set[str]) -> None:
    before = snapshot(*(node(name) for name in old))
    after = snapshot(*(node(name, "1" if name in changed else "") for name in new))
    lines = patch(before, GraphDiff.between(before, after))
    assert tuple(line.row for line in lines if line.sign in "- ") == before.rows
    assert tuple(line.row for line in lines if line.sign in "+ ") == after.rows


@pytest.fixture(scope="module")
def history() -> History:
    return llama_inspection().graphs[0].history


def test_hunks_hold_the_wanted_changes_and_lines_around_them(history: History) -> None:
    index = next(r.index for r in history.records if r.spec.startswith("rewrite-mixed-linear"))
    diff = history.records[index - 1].diff
    assert diff is not None
    lines = patch(history.snapshot(index - 1), diff)
    wanted = "model.layers.1.mlp.down_proj"
    found = list(hunks(lines, lambda row: row.fqn.startswith(wanted)))
    changes = [line for hunk in found for line in hunk if line.sign != " "]
    assert changes
    assert all(line.row.fqn.startswith(wanted) for line in changes)
    assert any(line.sign == " " for hunk in found for line in hunk)


def test_stretches_that_are_far_apart_are_hunks_of_their_own() -> None:
    lines = [PatchLine("+" if place in (0, 20) else " ", node(str(place))) for place in range(30)]
    assert [len(hunk) for hunk in hunks(lines, lambda row: True)] == [3, 5]
