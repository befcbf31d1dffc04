"""`expand-linear`: the one operator of a MixqLinear becomes its parts, and computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captures import ROUTES, capture
from linear_models import ATTENTION, FEATURES, captured, network, rows, statistics
from rewriting import call, mixq_calls, nodes_of, reasons, run
from torch import nn

import mixq_compile as mixq
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ops import providers
from mixq_compile.ops.providers import Provider
from mixq_compile.runtime.weight_store import STORE

FUSED = "strip-guards,expand-linear,share-quantize,fuse-epilogue"
PARTS = ["quantize_online", "refresh_outlier_weights", "mixed_gemm", "dequantize"]


def swapped(scheme: str = "w8a8o16", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return mixq.quantize(nn.Sequential(nn.Linear(FEATURES, 32)), scheme, **options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_parts_are_visible_and_equal_the_operator(route: str, dynamic: bool) -> None:
    model, x = swapped(), rows(6, columns=(3,))
    expected = model(x)
    mixq.reset(model)
    graph = captured(model, route, rows(6), dynamic=dynamic)
    history = run(graph, "strip-guards,expand-linear", weights=STORE)
    assert mixq_calls(graph) == PARTS
    assert reasons(history, "expand-linear") == {"0": "applied: expanded into its parts"}
    run(graph, FUSED, weights=STORE)
    assert torch.equal(call(graph, x), expected)
    assert model[0].outlier_state().columns() == [3]


@pytest.mark.parametrize(
    ("scheme", "options", "parts"),
    [
        ("w8a8", {}, ["quantize", "mixed_gemm", "dequantize"]),
        ("w8a16", {}, ["weight_only_linear"]),
        ("w8a8o16", {"miss": "static", "stats": statistics({"0": {3: 9.0}})}, ["quantize", *PARTS[1:]]),
        ("w4a4o16", {"keep_originals": True}, PARTS),
    ],
    ids=["no outliers", "weight only", "static", "four bits"],
)
def test_parts_by_scheme(scheme: str, options: dict[str, Any], parts: list[str]) -> None:
    model, x = swapped(scheme, **options), rows(6, columns=(3,))
    expected = model(x)
    mixq.reset(model)
    graph = captured(model, "dynamo")
    run(graph, "strip-guards,expand-linear", weights=STORE)
    assert mixq_calls(graph) == parts
    run(graph, FUSED, weights=STORE)
    assert torch.equal(call(graph, x), expected)


def test_columns_of_fixed_states_are_annotated_so_that_others_do_not_join() -> None:
    stats = statistics({name: {place: 9.0} for place, name in enumerate(ATTENTION)})
    model = mixq.quantize(network(), miss="static", stats=stats)
    graph = capture(model, rows(6), route="dynamo")
    run(graph, "strip-guards,expand-linear,share-quantize", weights=STORE)
    found = [Annotations(node).outlier_columns for node in nodes_of(graph, "quantize")]
    assert sorted(found) == [[0], [1], [2], [3]]
    assert model.attn.q_proj.outlier_state().columns() == [0]
    assert model.attn.k_proj.outlier_state().columns() == [1]


@pytest.mark.parametrize(("invariant", "count"), [(False, 1), (True, 0)])
def test_few_fixed_rows_take_the_weight_only_kernel(
    invariant: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    providers.load_providers()
    kernels = {
        name: Provider(
            "mixed_linear", name, item.function, item.supports, item.priority, None, lambda query: 16
        )
        for name, item in providers._PROVIDERS["mixed_linear"].items()
    }
    monkeypatch.setitem(providers._PROVIDERS, "mixed_linear", kernels)
    providers.choose.cache_clear()
    graph = captured(swapped(batch_invariant=invariant), "dynamo", rows(4))
    run(graph, "strip-guards,expand-linear", weights=STORE)
    assert mixq_calls(graph).count("weight_only_linear") == count
    providers.choose.cache_clear()


def test_name_and_role_are_annotated() -> None:
    graph = captured(mixq.quantize(network()), "export")
    run(graph, "strip-guards,expand-linear", weights=STORE)
    found = {Annotations(node).fqn: Annotations(node).role for node in nodes_of(graph, "mixed_gemm")}
    assert found == dict(zip(ATTENTION, ("q", "k", "v", "o"), strict=True))
