"""`annotate-outliers`: calibrated columns, by the scheme of each linear."""

from __future__ import annotations

import pytest
import torch
from captures import ROUTES
from linear_models import ATTENTION, captured, network, statistics
from rewriting import NAMED, decisions, reasons, run

from mixq_compile.errors import OptionError, StatisticsError
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import PassError
from mixq_compile.scheme import OutlierPolicy, QuantScheme
from mixq_compile.schemes.registry import get_scheme
from mixq_compile.selection.columns import calibrated_columns

MAXIMA = {
    "attn.q_proj": {3: 9.0, 40: 30.0},
    "attn.k_proj": {},
    "attn.v_proj": {5: 6.0},
    "attn.o_proj": {1: 6.5},
}


def annotate(graph: CapturedGraph, stats, options: str = "force=true threshold=6"):  # type: ignore[no-untyped-def]
    return run(graph, f"{NAMED},select-scheme{{{options}}},annotate-outliers", stats=stats)


def columns(graph: CapturedGraph) -> dict[str, list[int] | None]:
    nodes = graph.walk(torch.ops.aten.linear.default)
    return {Annotations(node).fqn: Annotations(node).outlier_columns for node in nodes}


@pytest.mark.parametrize("route", ROUTES)
def test_columns_above_the_threshold_are_annotated(route: str) -> None:
    graph = captured(network(), route)
    history = annotate(graph, statistics(MAXIMA))
    assert columns(graph) == {
        "attn.q_proj": [3, 40], "attn.k_proj": [], "attn.v_proj": [], "attn.o_proj": [1], "lm_head": None,
    }  # fmt: skip
    assert reasons(history, "annotate-outliers") == {
        "attn.q_proj": "applied: 2 of 64 columns, of magnitude 9 to 30",
        "attn.k_proj": "applied: 0 of 64 columns",
        "attn.v_proj": "applied: 0 of 64 columns",
        "attn.o_proj": "applied: 1 of 64 columns, of magnitude 6.5 to 6.5",
    }
    views = {Annotations(node).fqn: Annotations(node) for node in graph.walk(torch.ops.aten.linear.default)}
    assert views["attn.q_proj"].column_max == [9.0, 30.0]


def test_the_threshold_of_the_scheme_decides() -> None:
    graph = captured(network(), "dynamo")
    annotate(graph, statistics(MAXIMA), "force=true threshold=10.0")
    assert columns(graph)["attn.q_proj"] == [40]


def test_of_more_columns_than_slots_the_largest_are_taken() -> None:
    graph = captured(network(), "dynamo")
    many = {name: {column: 10.0 + column for column in range(40)} for name in ATTENTION}
    annotate(graph, statistics(many))
    assert columns(graph)["attn.q_proj"] == list(range(24, 40))


def test_with_4_bit_activations_every_slot_is_used() -> None:
    graph = captured(network(), "dynamo")
    annotate(graph, statistics(MAXIMA), "force=true default=w4a4o16")
    found = columns(graph)["attn.q_proj"]
    assert len(found) == 16
    assert {3, 40} <= set(found)


@pytest.mark.parametrize(("choose", "expected"), [("above", 2), ("largest", 16)])
@pytest.mark.parametrize("name", ["w8a8o16", "w4a8o16", "w4a4o16"])
def test_the_policy_and_not_the_number_of_bits_says_how_many(name: str, choose: str, expected: int) -> None:
    scheme = get_scheme(name).with_outliers(choose=choose, threshold=6.0)
    found = calibrated_columns(statistics(MAXIMA), "attn.q_proj", scheme, 64)
    assert found is not None
    assert len(found[0]) == expected
    assert {3, 40} <= set(found[0])


@pytest.mark.parametrize("name", ["w8a8o16", "w4a8o16", "w4a4o16"])
def test_schemes_in_older_files_choose_as_they_did(name: str) -> None:
    written = get_scheme(name).to_json()
    del written["outliers"]["choose"]
    assert QuantScheme.from_json(written) == get_scheme(name)


def test_another_choice_of_columns_is_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown choice of columns 'most'.* Valid: above, largest"):
        OutlierPolicy(choose="most")


def test_each_linear_is_treated_by_its_own_scheme() -> None:
    graph = captured(network(), "dynamo")
    annotate(graph, statistics(MAXIMA), "force=true threshold=6 layers=attn.k_proj=w4a4o16,attn.o_proj=w8a8")
    found = columns(graph)
    assert len(found["attn.k_proj"]) == 16
    assert found["attn.q_proj"] == [3, 40]
    assert found["attn.o_proj"] is None, "a scheme without outliers got columns"


def test_without_statistics_nothing_is_decided() -> None:
    graph = captured(network(), "dynamo")
    assert decisions(annotate(graph, None), "annotate-outliers") == []


def test_statistics_of_another_model_are_refused() -> None:
    with pytest.raises(PassError, match="the statistics belong to another model") as caught:
        annotate(captured(network(), "dynamo"), statistics({"encoder.fc1": {}}))
    assert isinstance(caught.value.__cause__, StatisticsError)


def test_statistics_of_another_width_are_refused() -> None:
    with pytest.raises(PassError, match="K is 64, calibrated with 32"):
        annotate(captured(network(), "dynamo"), statistics({name: {} for name in ATTENTION}, features=32))


def test_statistics_need_not_cover_linears_that_are_left_alone() -> None:
    graph = captured(network(), "dynamo")
    annotate(graph, statistics({"attn.q_proj": {3: 9.0}}), "force=true ignore=k_proj,v_proj,o_proj,lm_head")
    assert columns(graph)["attn.q_proj"] == [3]


def test_a_scheme_without_outliers_has_no_columns() -> None:
    assert calibrated_columns(statistics(MAXIMA), "attn.q_proj", get_scheme("w8a8"), 64) is None
    assert calibrated_columns(statistics(MAXIMA), "attn.q_proj", get_scheme("w8a16"), 64) is None
