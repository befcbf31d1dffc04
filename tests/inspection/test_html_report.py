import dataclasses
import functools
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
from inspected_models import llama_inspection
from reports import (
    BLOCKS,
    HOSTILE,
    deep_inspection,
    failing_inspection,
    hostile_inspection,
    measured_inspection,
    unrecorded_inspection,
)

from mixq_compile.inspection import html
from mixq_compile.inspection.files import load_inspection
from mixq_compile.inspection.html import render_html, save_html
from mixq_compile.inspection.inspection import Inspection
from mixq_compile.inspection.island import read_island
from mixq_compile.inspection.neighbourhood import (
    MOST_NODES,
    MOST_PICTURES,
    Surroundings,
    neighbourhood_svg,
    pictures_of,
)
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.snapshot import NodeRow, Snapshot

SVG = "{http://www.w3.org/2000/svg}"
MEGABYTE = 1e6
PAGE = resources.files("mixq_compile.inspection") / "page"

MAKERS = [measured_inspection, failing_inspection, unrecorded_inspection, hostile_inspection, deep_inspection]


@functools.cache
def page_of(make: Callable[[], Inspection]) -> str:
    return render_html(make())


def row(
    name: str, *inputs: str, fqn: str = "", op: str = "call_function", value: str = "float32[2]"
) -> NodeRow:
    arguments = ", ".join(f"%{source}" for source in inputs)
    return NodeRow(name, op, "aten.neg.default", arguments, inputs, value, fqn, "", {})


def surroundings(before: list[NodeRow], after: list[NodeRow]) -> Surroundings:
    first, second = Snapshot(tuple(before)), Snapshot(tuple(after))
    return Surroundings.of(first, second, GraphDiff.between(first, second))


def drawn_nodes(svg: str) -> dict[str, set[str]]:
    """Of each drawn node, its classes."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    return {group.attrib["data-node"]: set(group.attrib["class"].split()) for group in groups}


def all_pictures(make: Callable[[], Inspection]) -> list[dict]:
    found = read_island(page_of(make))["neighbourhoods"]
    return [picture for graph in found for drawn in graph.values() for picture in drawn["pictures"]]


@pytest.mark.parametrize("make", MAKERS)
def test_a_report_holds_its_inspection(make, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    save_html(make(), path)
    assert load_inspection(path) == make()


def test_a_report_is_the_same_for_the_same_inspection() -> None:
    assert render_html(llama_inspection()) == page_of(llama_inspection)


def test_a_report_of_32_blocks_stays_small() -> None:
    inspection = deep_inspection()
    assert len(inspection.graphs[0].layers) == 7 * BLOCKS + 1
    assert len(page_of(deep_inspection).encode()) < 5 * MEGABYTE


@pytest.mark.parametrize("make", MAKERS)
def test_a_report_names_no_resource(make) -> None:
    page = page_of(make)
    assert set(re.findall(r"https?://[^\"'\s]*", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<\w[^<>]*\s(src|href)\s*=|url\(|@import|\bimport\(", page)


def test_a_report_may_load_nothing_but_its_own_style_and_script() -> None:
    page = page_of(llama_inspection)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; ")
    assert policy.count("sha256-") == 2
    assert "unsafe" not in policy


def test_names_do_not_break_out() -> None:
    page = page_of(hostile_inspection)
    assert HOSTILE not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page


def test_a_model_without_a_name_has_a_title() -> None:
    page = render_html(dataclasses.replace(llama_inspection(), model=""))
    assert "<title>a graph · mixq report</title>" in page


def test_every_part_of_the_page_is_used_and_short() -> None:
    names = {part.name for part in PAGE.iterdir()}
    assert names == {"page.html", *html.STYLES, *html.SCRIPTS}
    long = {name for name in names if len((PAGE / name).read_text().splitlines()) > 400}
    assert not long


def test_the_parts_of_the_page_are_packaged() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["mixq_compile.inspection"] == ["page/*"]


@pytest.mark.parametrize("make", MAKERS)
def test_drawings_are_well_formed_and_small(make) -> None:
    for picture in all_pictures(make):
        nodes = drawn_nodes(picture["svg"])
        assert len(nodes) == picture["drawn"] <= MOST_NODES


def test_each_pass_that_changed_something_is_drawn() -> None:
    (graph,) = llama_inspection().graphs
    (drawn,) = read_island(page_of(llama_inspection))["neighbourhoods"]
    assert list(drawn) == [str(record.index) for record in graph.history.records if record.diff]


def test_layers_that_fared_alike_are_drawn_once() -> None:
    kinds = {picture["kind"]: picture for picture in all_pictures(deep_inspection)}
    picture = kinds["model.layers.*.self_attn.q_proj"]
    assert picture["layer"] == "model.layers.0.self_attn.q_proj"
    assert picture["alike"] == BLOCKS


def test_a_drawing_shows_what_was_added_removed_and_changed() -> None:
    before = [row("x"), row("old", "x"), row("reader", "old"), row("far", "reader"), row("farther", "far")]
    after = [row("x"), row("new", "x"), row("reader", "new"), row("far", "reader"), row("farther", "far")]
    around = surroundings(before, after)
    focus = ["old", "new"]
    drawn, left_out = around.around(focus)
    assert drawn_nodes(neighbourhood_svg(around, drawn, focus)) == {
        "old": {"node", "removed", "focus"},
        "new": {"node", "added", "focus"},
        "x": {"node", "context"},
        "reader": {"node", "changed"},
        "far": {"node", "context"},
    }
    assert left_out == 0


def test_data_flows_from_left_to_right() -> None:
    rows = [
        row("a"),
        row("b", "a"),
        row("c", "b"),
        row("d", "c", "a"),
        row("constant"),
        row("e", "d", "constant"),
    ]
    svg = neighbourhood_svg(surroundings(rows, rows), [node.name for node in rows], [])
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    lefts = {
        group.attrib["data-node"]: int(group.attrib["transform"].removeprefix("translate(").split()[0])
        for group in groups
    }
    assert lefts["a"] < lefts["b"] < lefts["c"] < lefts["d"] < lefts["e"]
    assert lefts["constant"] == lefts["d"], "what reads nothing stands beside what is read with it"


def test_boxes_do_not_overlap() -> None:
    for picture in all_pictures(llama_inspection):
        boxes = []
        for group in ElementTree.fromstring(picture["svg"]).iter(f"{SVG}g"):
            left, top = (int(part) for part in re.findall(r"-?\d+", group.attrib["transform"]))
            boxes.append((left, top, left + int(group.find(f"{SVG}rect").attrib["width"]), top + 34))
        for place, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[place + 1 :]:
                apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
                assert apart, (picture["kind"], boxes[place], other)


def test_a_node_that_moved_behind_its_reader_is_drawn() -> None:
    first, second = row("first"), row("second")
    before = [row("x"), first, dataclasses.replace(second, inputs=("first",))]
    after = [row("x"), second, dataclasses.replace(first, inputs=("second",))]
    around = surroundings(before, after)
    assert set(drawn_nodes(neighbourhood_svg(around, ["first", "second"], ["first"]))) == {"first", "second"}


def test_a_drawing_is_cut_and_says_so() -> None:
    many = [row(f"n{number}", "x") for number in range(MOST_NODES + 5)]
    around = surroundings([row("x"), *many], [row("x"), *many])
    drawn, left_out = around.around(["x"])
    assert len(drawn) == MOST_NODES
    assert drawn[0] == "x"
    assert left_out == 6


def test_other_readers_of_a_value_that_many_read_are_left_out() -> None:
    others = [row(f"other{number}", "mask") for number in range(20)]
    before = [row("mask"), row("a", "mask"), *others]
    after = [row("mask"), row("b", "mask"), *others]
    drawn, left_out = surroundings(before, after).around(["a", "b"])
    assert set(drawn) == {"a", "b", "mask"}
    assert left_out == 20


def test_kinds_beyond_the_limit_are_counted() -> None:
    after = Snapshot(tuple(row(f"n{number}", fqn=f"part_{number}") for number in range(MOST_PICTURES + 3)))
    pictures, left_out = pictures_of(Snapshot(()), after, GraphDiff.between(Snapshot(()), after), ())
    assert len(pictures) == MOST_PICTURES
    assert left_out == 3


def test_labels_name_the_operator() -> None:
    nodes = [
        dataclasses.replace(row("a"), target="aten.mul.Tensor"),
        dataclasses.replace(row("b", "a"), target="nn.functional.silu"),
        dataclasses.replace(row("c", "b"), target="getitem", args="%b, 2"),
        dataclasses.replace(row("d", "c"), target="mixq.mixed_gemm.default"),
        dataclasses.replace(row("e", op="placeholder", fqn="model.layers.0.q_proj.weight"), target="p"),
        dataclasses.replace(row("f", "e", "d", op="output"), target="output"),
    ]
    svg = neighbourhood_svg(surroundings(nodes, nodes), [node.name for node in nodes], [])
    labels = [
        text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text") if text.attrib["class"] == "what"
    ]
    assert labels == ["mul", "silu", "getitem 2", "mixed_gemm", "q_proj.weight", "return"]
