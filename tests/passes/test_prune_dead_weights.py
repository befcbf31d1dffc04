"""`prune-dead-weights`: what nothing reads any more is deleted, and nothing else."""

from __future__ import annotations

import pytest
import torch
from captures import ROUTES
from linear_models import ATTENTION, captured, network, rows
from rewriting import WHOLE, call, calls, decisions, run
from torch import nn

from mixq_compile.pipeline import Fuel, Pipeline
from mixq_compile.pipeline.bisection import rewrites


def test_16_bit_weights_of_an_exported_program_are_deleted() -> None:
    model = network()
    graph = captured(model, "export")
    run(graph, WHOLE.replace("kernel=ref}", "kernel=ref originals=false}", 1))
    left = {name for name, _ in graph.module.named_parameters()}
    assert not any(f"{name}.weight" in left for name in ATTENTION)
    assert {"lm_head.weight", "attn.q_proj.bias"} <= left
    assert hasattr(model.attn.q_proj, "weight"), "the program's own model lost a weight"


def test_originals_that_are_read_stay() -> None:
    graph = captured(network(), "export")
    run(graph, WHOLE)
    assert "attn.q_proj.weight" in {name for name, _ in graph.module.named_parameters()}


@pytest.mark.parametrize("route", ROUTES)
def test_state_buffers_that_were_joined_are_deleted(route: str) -> None:
    graph = captured(network(), route)
    run(graph, WHOLE)
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    assert set(graph.attached) <= read


def test_placeholders_stay_although_nothing_reads_them() -> None:
    graph = captured(network(), "dynamo")
    before = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    run(graph, WHOLE.replace("kernel=ref}", "kernel=ref originals=false}", 1))
    assert [node.name for node in graph.graph.nodes if node.op == "placeholder"] == before


def test_dead_calls_are_erased_and_those_with_an_effect_stay() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            x.sin()
            return self.linear(x)

    model = Counting()
    graph = captured(model, "export")
    run(graph, WHOLE)
    before = model.calls.clone()
    call(graph, rows(6))
    assert torch.equal(graph.module.calls, before + 1), "a write was taken for dead"
    assert not any("sin" in str(node.target) for node in graph.graph.nodes)


def test_each_deletion_is_a_decision() -> None:
    graph = captured(network(), "export")
    history = run(graph, WHOLE.replace("kernel=ref}", "kernel=ref originals=false}", 1))
    found = {decision.fqn: decision.reason for decision in decisions(history, "prune-dead-weights")}
    assert found["attn.q_proj.weight"] == "no reader is left: deleted"


def test_each_dead_call_is_a_rewrite_that_fuel_pays_for() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.sin().cos()
            return self.linear(x)

    left = []
    for fuel in range(4):
        graph = captured(Dead(), "export")
        history = run(graph, "prune-dead-weights", fuel=Fuel(fuel))
        found = {name for name in ("sin", "cos") if f"aten.{name}.default" in calls(graph)}
        left.append(found)
        assert len(decisions(history, "prune-dead-weights")) == 2 - len(found)
    assert left == [{"sin", "cos"}, {"sin"}, set(), set()], "readers go before what they read"


def test_a_bisection_blames_the_erasure() -> None:
    graph = captured(network(), "export")
    text = WHOLE.replace("kernel=ref}", "kernel=ref originals=false}", 1)
    history = run(graph, text)
    found = rewrites(Pipeline.parse(text), history)
    last = next(each for each in found if each.decision.node == "attn.q_proj.weight")
    assert last.spec == "prune-dead-weights"
    for fuel, kept in ((last.number - 1, True), (last.number, False)):
        again = captured(network(), "export")
        run(again, text, fuel=Fuel(fuel))
        names = {name for name, _ in again.module.named_parameters()}
        assert ("attn.q_proj.weight" in names) == kept
