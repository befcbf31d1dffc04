"""What every installed pass promises, whoever wrote it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from captures import ROUTES
from linear_models import ATTENTION, captured, network, statistics
from rewriting import WHOLE, run

import mixq_compile as mixq
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.snapshot import Snapshot
from mixq_compile.ir.verify import verify
from mixq_compile.pipeline import Fuel, Pass, PassContext, Pipeline, get_pass, pass_names
from mixq_compile.pipeline.registry import option_types
from mixq_compile.pipeline.runner import run_passes
from mixq_compile.runtime.weight_store import STORE

BEFORE = {
    "expand-linear": "strip-guards",
    "fuse-activation": (
        "strip-guards,canonicalize-linear,select-scheme{force=true},rewrite-mixed-linear,share-quantize,"
        "fuse-epilogue"
    ),
    "fuse-gate": (
        "strip-guards,canonicalize-linear,select-scheme{force=true},rewrite-mixed-linear,share-quantize,"
        "fuse-epilogue,merge-siblings{when=always}"
    ),
    "merge-siblings": (
        "strip-guards,canonicalize-linear,select-scheme{force=true},rewrite-mixed-linear,share-quantize,"
        "fuse-epilogue"
    ),
    "annotate-outliers": "canonicalize-linear,select-scheme{force=true}",
    "equalize-inputs": "strip-guards,canonicalize-linear,select-scheme{force=true}",
    "fold-input-scales": "strip-guards,canonicalize-linear,select-scheme{force=true},equalize-inputs",
    "rotate-inputs": "strip-guards,canonicalize-linear,select-scheme{force=true}",
}
"""Passes to run before one, where that is not the passes before it in `jit`."""

OPTIONS = {name: {"when": "always"} for name in ("merge-siblings", "fuse-gate")}
"""Options of a pass under which it has something to do on a CPU."""


def step_of(name: str) -> Pass:
    """The pass as it is tested."""
    return get_pass(name)(**OPTIONS.get(name, {}))


def prefix_of(name: str) -> str:
    """The passes that a pass needs to have run."""
    if name in BEFORE:
        return BEFORE[name]
    steps = WHOLE.split(",")
    names = [step.split("{")[0] for step in steps]
    return ",".join(steps[: names.index(name)]) if name in names else ""


def graph_for(name: str, route: str) -> CapturedGraph:
    model = network()
    return captured(mixq.quantize(model) if name == "expand-linear" else model, route)


def context() -> PassContext:
    stats = statistics({name: {3: 9.0} for name in ATTENTION})
    return PassContext(stats=stats, weights=STORE)


def prepared(name: str, route: str) -> CapturedGraph:
    graph = graph_for(name, route)
    if prefix_of(name):
        Pipeline.parse(prefix_of(name)).run(graph, context(), verify="full")
    return graph


def whole_text(name: str) -> str:
    return ",".join(part for part in (prefix_of(name), step_of(name).spec()) if part)


@pytest.fixture(params=[(name, route) for name in pass_names() for route in ROUTES], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def run_alone(name: str, graph: CapturedGraph):  # type: ignore[no-untyped-def]
    """One pass on a graph whose other passes have run."""
    step = step_of(name)
    return run_passes([step], step.spec(), graph, context(), "full", True)


def test_the_graph_holds_afterwards(case: tuple[str, str]) -> None:
    graph = prepared(*case)
    run_alone(case[0], graph)
    assert verify(graph) == []
    graph.graph.lint()


def test_a_second_run_finds_nothing_to_do(case: tuple[str, str]) -> None:
    graph = prepared(*case)
    run_alone(case[0], graph)
    once = Snapshot.of(graph)
    run_alone(case[0], graph)
    assert Snapshot.of(graph) == once


def test_without_fuel_neither_graph_nor_module_changes(case: tuple[str, str]) -> None:
    """A pass that acts before it announces, or while it matches, could not be blamed by a bisection."""
    graph = prepared(*case)

    def state() -> tuple[list[str], list[str]]:
        tensors = (*graph.module.named_parameters(), *graph.module.named_buffers())
        return [row.line for row in Snapshot.of(graph).rows], sorted(name for name, _ in tensors)

    before = state()
    step = step_of(case[0])
    if step.spends_fuel:
        run_passes([step], step.spec(), graph, dataclasses.replace(context(), fuel=Fuel(0)), "full", True)
        assert state() == before, f"{case[0]} changed something that no fuel paid for"


def test_annotations_and_history_are_json(case: tuple[str, str]) -> None:
    graph = prepared(*case)
    history = run_alone(case[0], graph)
    json.dumps(history.to_json())
    for node in graph.graph.nodes:
        json.dumps(node.meta.get("custom", {}))


def test_metadata_of_nodes_that_stay_is_kept(case: tuple[str, str]) -> None:
    graph = prepared(*case)
    before = {
        node: {key: value for key, value in node.meta.items() if key != "custom"}
        for node in graph.graph.nodes
    }
    run_alone(case[0], graph)
    for node in graph.graph.nodes:
        if node in before:
            for key, value in before[node].items():
                assert node.meta.get(key) is value, f"{case[0]} changed meta[{key!r}] of {node.name}"


def test_new_calls_have_a_value_and_a_place_in_the_model(case: tuple[str, str]) -> None:
    graph = prepared(*case)
    before = set(graph.graph.nodes)
    run_alone(case[0], graph)
    for node in graph.graph.nodes:
        if node not in before:
            assert graph.has_value(node), f"{node.name} has no value"
            assert case[0] in (Annotations(node).origin or []), f"{node.name} does not say who made it"
            if node.op == "call_function":
                assert graph.fqn(node), f"{node.name} belongs to no layer"
                assert graph.location(node), f"{node.name} has no line"


def test_no_decision_lacks_a_reason(case: tuple[str, str]) -> None:
    history = run_alone(case[0], prepared(*case))
    assert all(decision.reason.strip() for decision in history.decisions())


def test_no_guard_is_added(case: tuple[str, str]) -> None:
    name, route = case
    model = network()
    graph = captured(mixq.quantize(model) if name == "expand-linear" else model, route, dynamic=True)
    guards = len(graph.fake_mode.shape_env.guards)
    Pipeline.parse(whole_text(name)).run(graph, context())
    assert len(graph.fake_mode.shape_env.guards) == guards


@pytest.mark.parametrize("name", pass_names())
def test_the_text_of_a_pass_round_trips(name: str) -> None:
    kind = get_pass(name)
    samples = {
        "text": "x y",
        "an integer": 32,
        "a number": 0.5,
        "true or false": True,
        "a list": ("a", "b c"),
    }
    for option, kind_of_value in option_types(kind).items():
        label = str(kind_of_value).removesuffix(", or none")
        value = next(
            (sample for text, sample in samples.items() if text in label),
            label.removeprefix("one of ").split(", ")[0],
        )
        step = dataclasses.replace(kind(), **{option: value})
        assert Pipeline.parse(step.spec()).passes == (step,), step.spec()


@pytest.mark.parametrize("name", pass_names())
def test_a_pass_and_its_options_are_documented(name: str) -> None:
    kind = get_pass(name)
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}("), "the docstring is the one dataclass made"


def test_whole_pipelines_leave_no_16_bit_product_behind() -> None:
    graph = captured(network(), "export")
    run(graph, WHOLE)
    assert [node.args[1].target for node in graph.walk(torch.ops.aten.linear.default)] == ["lm_head.weight"]
