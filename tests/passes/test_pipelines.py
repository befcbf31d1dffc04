"""The named pipelines: their texts, and what each makes of a small model."""

from __future__ import annotations

import pytest
import torch
from captures import ROUTES, capture
from linear_models import captured, network, rows
from rewriting import assert_golden, call, mixq_calls, run, sqnr

import mixq_compile as mixq
from mixq_compile.ir.snapshot import Snapshot
from mixq_compile.pipeline import Pipeline, pipeline_names
from mixq_compile.runtime.weight_store import STORE


def on_the_reference(name: str) -> str:
    """A named pipeline that quantizes everything with the reference's kernels."""
    pipeline = Pipeline.named(name).with_options("select-kernels", kernel="ref")
    if name != "swapped":
        pipeline = pipeline.with_options("select-scheme", force=True)
        pipeline = pipeline.with_options("rewrite-mixed-linear", kernel="ref")
    return str(pipeline)


def test_texts() -> None:
    lines = [f"{name} = {Pipeline.named(name)}" for name in pipeline_names()]
    assert_golden("pipelines.txt", "\n".join(lines) + "\n")


@pytest.mark.parametrize("name", pipeline_names())
def test_each_is_well_formed(name: str) -> None:
    pipeline = Pipeline.named(name)
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert pipeline.build() is pipeline
    assert [step.name for step in pipeline][-1] == "verify"


def program(graph) -> str:  # type: ignore[no-untyped-def]
    return Snapshot.of(graph).text + "\n"


def test_what_jit_makes_of_an_attention_block() -> None:
    exported, traced = (captured(network(), route) for route in ("export", "dynamo"))
    run(exported, on_the_reference("jit"))
    run(traced, on_the_reference("jit"))
    assert_golden("jit_export.txt", program(exported))
    # Dynamo's own names are not this project's to promise, but the operators and their order are.
    assert mixq_calls(traced) == mixq_calls(exported)


def test_what_swapped_makes_of_it() -> None:
    graph = captured(mixq.quantize(network()), "export")
    run(graph, on_the_reference("swapped"), weights=STORE)
    assert_golden("swapped_export.txt", program(graph))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_both_ways_compute_the_same_bits(route: str, dynamic: bool) -> None:
    x = rows(6, columns=(3, 40))
    ordinary = captured(network(), route, dynamic=dynamic)
    jit = on_the_reference("jit").replace("{kernel=ref}", "{kernel=ref originals=false}", 1)
    run(ordinary, jit)
    swapped = capture(mixq.quantize(network()), rows(6), route=route, dynamic=dynamic)
    run(swapped, on_the_reference("swapped"), weights=STORE)
    results = [call(graph, x) for graph in (ordinary, swapped)]
    assert torch.equal(*results)
    assert sqnr(network()(x), results[0]) > 30
