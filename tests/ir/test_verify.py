from collections.abc import Callable

import pytest
import torch
from captures import ROUTES, TwoLayers, capture, captured_llama, linears
from torch import nn

from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.verify import describe, verify

aten = torch.ops.aten


@pytest.fixture(params=ROUTES)
def graph(request: pytest.FixtureRequest) -> CapturedGraph:
    return capture(TwoLayers(), torch.randn(2, 8), route=request.param)


def messages(graph: CapturedGraph, nodes: list | None = None) -> list[tuple[str, str]]:
    return [(violation.node, violation.message) for violation in verify(graph, nodes)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_as_captured_holds(route: str, dynamic: bool) -> None:
    assert verify(capture(TwoLayers(), torch.randn(5, 8), route=route, dynamic=dynamic)) == []


def test_a_llama_as_captured_holds() -> None:
    for graph in map(captured_llama, ROUTES):
        assert verify(graph) == []


def test_swapped_operands_are_found_where_lint_is_content(graph: CapturedGraph) -> None:
    node = linears(graph)[1]
    node.args = (node.args[1], node.args[0], *node.args[2:])
    graph.graph.lint()
    ((name, message),) = messages(graph)
    assert name == node.name
    assert message == "records float32[2, 8], its operator gives float32[8, 2]"


def test_operands_that_do_not_fit_are_named_with_the_operators_reason(graph: CapturedGraph) -> None:
    first, second = linears(graph)
    second.args = (first, first.args[1])
    ((name, message),) = messages(graph)
    assert name == second.name
    assert message.startswith("its operator refuses its inputs: RuntimeError: ")


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (lambda value: value.double(), "float64[2, 16]"),
        (lambda value: value.to("meta"), "float32[2, 16] meta"),
        (lambda value: value[:1], "float32[1, 16]"),
        (lambda value: (value, value), "2 results"),
    ],
)
def test_a_wrong_record_is_found(graph: CapturedGraph, wrong: Callable, shown: str) -> None:
    first = linears(graph)[0]
    graph.set_value(first, wrong(graph.value(first)))
    assert any(name == first.name and shown in message for name, message in messages(graph))


def test_only_the_given_nodes_are_checked(graph: CapturedGraph) -> None:
    first, second = linears(graph)
    for node in (first, second):
        graph.set_value(node, graph.value(node).double())
    assert [name for name, _ in messages(graph, [first])] == [first.name]


def test_annotations_that_are_not_json_are_found(graph: CapturedGraph) -> None:
    first = linears(graph)[0]
    first.meta["custom"] = {"mixq": {"role": object()}}
    ((name, message),) = messages(graph)
    assert name == first.name
    assert "must be JSON" in message


def test_an_attribute_that_is_gone_is_found(graph: CapturedGraph) -> None:
    node = graph.attach("scale", torch.ones(1))
    del graph.module.scale
    assert messages(graph) == [(node.name, "reads 'scale', which the module does not have")]


def test_a_use_before_its_definition_is_found(graph: CapturedGraph) -> None:
    first, second = linears(graph)
    second.append(first)
    ((name, message),) = messages(graph)
    assert name == ""
    assert first.name in message


def test_a_check_adds_no_guard() -> None:
    graph = capture(TwoLayers(), torch.randn(5, 8), route="dynamo", dynamic=True)
    before = len(graph.fake_mode.shape_env.guards)
    assert verify(graph) == []
    assert len(graph.fake_mode.shape_env.guards) == before


def test_a_fixed_size_in_place_of_a_symbolic_one_is_found_by_its_traced_value() -> None:
    graph = capture(TwoLayers(), torch.randn(5, 8), route="export", dynamic=True)
    first = linears(graph)[0]
    graph.set_value(first, graph.fake_mode.from_tensor(torch.empty(6, 16), static_shapes=True))
    assert [name for name, _ in messages(graph, [first])] == [first.name]


def test_an_operator_runs_once_for_inputs_of_one_kind(graph: CapturedGraph) -> None:
    ran: list[str] = []

    def counting(x: torch.Tensor) -> torch.Tensor:
        ran.append("")
        return x.neg()

    first, second = linears(graph)
    for node in (first, first, second):
        with graph.graph.inserting_after(node):
            graph.call(counting, (node,))
    assert verify(graph) == []
    assert len(ran) == 2
    graph.set_value(first, graph.value(first).double())
    verify(graph)
    assert len(ran) == 3


def test_calls_that_write_in_place_are_not_run() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y.unsqueeze_(0)
        y.add_(1)
        return y

    graph = capture(function, torch.randn(2, 3), route="dynamo")
    shapes = [str(graph.value(node).shape) for node in graph.graph.nodes if node.op != "output"]
    assert verify(graph) == []
    assert [str(graph.value(node).shape) for node in graph.graph.nodes if node.op != "output"] == shapes


def test_calls_whose_shape_depends_on_data_are_taken_as_they_are() -> None:
    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x.sum(1) > 0] * 2

    assert verify(capture(Chosen(), torch.randn(4, 3), route="export")) == []


def test_calls_under_autocast_are_taken_as_they_are() -> None:
    model = nn.Linear(4, 4)

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert verify(capture(function, torch.randn(2, 4), route="dynamo")) == []


def test_values_are_described_in_a_line(graph: CapturedGraph) -> None:
    value = graph.value(linears(graph)[0])
    assert describe(value) == "float32[2, 16]"
    assert describe((value, None, 3)) == "(float32[2, 16], , 3)"
    assert describe(None) == ""
