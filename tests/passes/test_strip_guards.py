"""`strip-guards`: what it erases and what it keeps."""

from __future__ import annotations

import pytest
import torch
from captures import ROUTES, capture, capture_export
from rewriting import call, calls, decisions, run
from torch import Tensor, nn

from mixq_compile.ir.graph import CapturedGraph


class Idle(nn.Module):
    """A linear behind everything that has no effect at inference."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x.detach())
        return self.linear(nn.functional.dropout(x, p=0.1, training=self.training))


@pytest.mark.parametrize("route", ROUTES)
def test_idle_dropouts_and_detaches_are_erased(route: str) -> None:
    model, x = Idle().eval(), torch.randn(3, 8)
    graph = capture(model, x, route=route)
    run(graph, "strip-guards")
    assert len(calls(graph)) == 1
    assert torch.equal(call(graph, x), model(x))


def test_a_dropout_that_trains_stays() -> None:
    graph = capture(Idle().train(), torch.randn(3, 8), route="dynamo")
    run(graph, "strip-guards")
    assert sum("dropout" in name for name in calls(graph)) == 2


def test_a_dropout_of_nothing_is_erased_in_training_too() -> None:
    graph = capture(nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 8)), torch.randn(3, 8), route="export")
    run(graph, "strip-guards")
    assert calls(graph) == ["aten.linear.default"]


def test_guard_calls_of_an_exported_program_are_erased() -> None:
    graph = capture_export(nn.Linear(8, 8), torch.randn(3, 8), dynamic=True)
    guards = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert guards == ["_guards_fn"]
    history = run(graph, "strip-guards")
    assert calls(graph) == ["aten.linear.default"]
    assert not hasattr(graph.module, "_guards_fn")
    assert [decision.reason for decision in decisions(history, "strip-guards")] == ["guard call erased"]


def test_metadata_assertions_are_erased() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin().float()

    program = torch.export.export(Cast(), (torch.randn(3, 8),))
    graph = CapturedGraph.from_export(program)
    run(graph, "strip-guards")
    assert not any("_assert" in name for name in calls(graph))


def test_nothing_to_strip_is_no_decision() -> None:
    graph = capture(nn.Linear(8, 8), torch.randn(3, 8), route="dynamo")
    assert decisions(run(graph, "strip-guards"), "strip-guards") == []
