import operator

import pytest
import torch
from captures import ROUTES, TwoLayers, capture, captured_llama, linears
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.evaluate import UnknownValueError
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.runtime.torch_compat import register_attribute_sources

aten = torch.ops.aten

pytestmark = pytest.mark.filterwarnings("ignore:.*not (meant|supposed) to be.*")


@torch.library.custom_op("mixq_test::count", mutates_args=("counter",))
def count_rows(x: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    counter += x.shape[0]
    return x.clone()


@count_rows.register_fake
def _(x, counter):
    return torch.empty_like(x)


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def graph(route: str) -> CapturedGraph:
    return capture(TwoLayers(), torch.randn(2, 8), route=route)


class TestValues:
    def test_every_tensor_of_a_capture_has_a_fake_value(self, graph: CapturedGraph) -> None:
        first, second = linears(graph)
        assert isinstance(graph.value(first), FakeTensor)
        assert graph.value(first).shape == (2, 16)
        assert graph.value(second).shape == (2, 8)

    def test_a_constant_is_its_own_value(self, graph: CapturedGraph) -> None:
        assert graph.value(3) == 3

    def test_the_fake_mode_is_the_captures_own(self, graph: CapturedGraph) -> None:
        assert graph.value(linears(graph)[0]).fake_mode is graph.fake_mode

    def test_a_graph_without_values_gets_a_mode(self) -> None:
        traced = torch.fx.symbolic_trace(nn.Linear(4, 4))
        graph = CapturedGraph(traced, "export")
        assert graph.fake_mode is graph.fake_mode

    def test_a_value_is_written_where_the_origin_keeps_it(self, graph: CapturedGraph) -> None:
        node = linears(graph)[0]
        graph.set_value(node, 7)
        assert node.meta["example_value" if graph.origin == "dynamo" else "val"] == 7


class TestTensors:
    def test_weights_and_buffers_are_the_models_own_tensors(self, route: str) -> None:
        model = TwoLayers()
        graph = capture(model, torch.randn(2, 8), route=route)
        first, _ = linears(graph)
        assert graph.tensor(first.args[1]) is model.first.weight
        assert graph.tensor(first.args[2]) is model.first.bias
        offset = next(node for node in graph.graph.nodes if graph.parameter_name(node) == "offset")
        assert torch.equal(graph.tensor(offset), model.offset)

    def test_activations_and_inputs_have_none(self, graph: CapturedGraph) -> None:
        first = linears(graph)[0]
        assert graph.tensor(first) is None
        assert graph.tensor(first.args[0]) is None

    def test_a_parameter_passed_as_an_argument_is_an_input(self) -> None:
        weight = nn.Parameter(torch.randn(4, 8))
        graph = capture(lambda x, w: nn.functional.linear(x, w), torch.randn(2, 8), weight, route="dynamo")
        (linear,) = linears(graph)
        assert graph.tensor(linear.args[1]) is None
        assert graph.parameter_name(linear.args[1]) == ""

    def test_the_parameter_behind_a_transposed_weight_is_found(self, graph: CapturedGraph) -> None:
        second = linears(graph)[1]
        with graph.graph.inserting_before(second):
            transposed = graph.call(aten.t.default, (second.args[1],))
        assert graph.weight_parameter(transposed) is second.args[1]
        assert graph.weight_parameter(second.args[1]) is second.args[1]
        assert graph.weight_parameter(second.args[0]) is None


class TestAttach:
    def test_a_tensor_becomes_a_buffer_behind_the_inputs(self, graph: CapturedGraph) -> None:
        tensor = torch.randn(16, 8)
        node = graph.attach("first.codes", tensor)
        assert graph.module.first_codes is tensor
        assert graph.attached == {"first_codes": tensor}
        assert graph.tensor(node) is tensor
        assert graph.value(node).shape == (16, 8)
        order = [other.op for other in graph.graph.nodes]
        assert set(order[: order.index("call_function")]) <= {"placeholder", "get_attr", "call_module"}
        graph.graph.lint()

    def test_one_tensor_has_one_node(self, graph: CapturedGraph) -> None:
        tensor = torch.randn(3)
        assert graph.attach("a", tensor) is graph.attach("b", tensor)
        assert graph.attach("a", torch.randn(3)) is not graph.attach("a", tensor)
        assert sorted(graph.attached) == ["a", "a_1"]

    def test_a_node_that_was_erased_is_made_again(self, graph: CapturedGraph) -> None:
        tensor = torch.randn(3)
        graph.graph.erase_node(graph.attach("a", tensor))
        assert graph.attach("a", tensor).target == "a"

    def test_names_that_python_or_the_module_would_refuse_are_changed(self, graph: CapturedGraph) -> None:
        assert graph.attach("0.weight", torch.zeros(1)).target == "_0_weight" or graph.origin == "export"
        assert graph.attach("training", torch.zeros(1)).target == "training_1"

    def test_attributes_nobody_reads_can_be_found_and_deleted(self, graph: CapturedGraph) -> None:
        graph.graph.erase_node(graph.attach("unread", torch.zeros(1)))
        assert graph.unread_attributes() == ["unread"]
        graph.delete_attribute("unread")
        assert graph.unread_attributes() == []
        assert not hasattr(graph.module, "unread")


class TestCalls:
    def test_a_new_call_takes_over_names_line_and_annotations(self, graph: CapturedGraph) -> None:
        first = linears(graph)[0]
        Annotations(first).role = "up"
        with graph.graph.inserting_before(first):
            made = graph.call(aten.neg.default, (first.args[0],), like=first)
        assert graph.fqn(made) == "first"
        assert graph.location(made) == graph.location(first)
        assert Annotations(made).role == "up"
        Annotations(made).role = "down"
        assert Annotations(first).role == "up"

    def test_its_value_is_what_the_operator_gives(self, graph: CapturedGraph) -> None:
        first = linears(graph)[0]
        with graph.graph.inserting_after(first):
            split = graph.call(aten.topk.default, (first, 2))
        with graph.graph.inserting_after(split):
            indexes = graph.getitem(split, 1)
        assert [value.dtype for value in graph.value(split)] == [torch.float32, torch.int64]
        assert graph.value(indexes).shape == (2, 2)
        assert indexes.target is operator.getitem

    def test_wrong_arguments_raise_and_leave_the_graph_alone(self, graph: CapturedGraph) -> None:
        first, second = linears(graph)
        before = list(graph.graph.nodes)
        with pytest.raises(RuntimeError), graph.graph.inserting_before(second):
            graph.call(aten.mm.default, (first, first))
        assert list(graph.graph.nodes) == before

    def test_an_argument_without_a_value_raises(self, graph: CapturedGraph) -> None:
        first = linears(graph)[0]
        first.meta.pop("val", None), first.meta.pop("example_value", None)
        with pytest.raises(UnknownValueError, match=first.name):
            graph.call(aten.neg.default, (first,))

    def test_custom_replaces_the_copied_annotations(self, graph: CapturedGraph) -> None:
        first = linears(graph)[0]
        Annotations(first).role = "up"
        made = graph.call(aten.neg.default, (first.args[0],), like=first, custom={"other": 1})
        assert made.meta["custom"] == {"other": 1}

    def test_symbolic_sizes_gain_no_guard(self, route: str) -> None:
        graph = capture(TwoLayers(), torch.randn(5, 8), route=route, dynamic=True)
        shapes = graph.fake_mode.shape_env
        guards = len(shapes.guards)
        first = linears(graph)[0]
        with graph.graph.inserting_after(first):
            flat = graph.call(aten.reshape.default, (first, [-1, 4, 4]), like=first)
        assert graph.value(flat).shape[0] == graph.value(first).shape[0]
        with graph.graph.inserting_after(flat):
            graph.call(aten.expand.default, (flat, [5, 4, 4]), like=first)
        assert len(shapes.guards) == guards


class TestRewriting:
    def test_walk_skips_what_was_erased_and_does_not_visit_what_is_new(self, graph: CapturedGraph) -> None:
        visited = []
        for node in graph.walk(torch._C._nn.linear, aten.linear.default):
            visited.append(node.name)
            with graph.graph.inserting_before(node):
                graph.replace(node, graph.call(aten.linear.default, node.args, like=node))
        assert len(visited) == 2
        assert len(linears(graph)) == 2
        graph.graph.lint()

    def test_walk_names_the_node_in_hand(self, graph: CapturedGraph) -> None:
        for node in graph.walk():
            assert graph.current is node
        assert graph.current is None

    def test_dead_calls_go_and_calls_that_write_stay(self, graph: CapturedGraph) -> None:
        first = linears(graph)[0]
        counter = graph.attach("counter", torch.zeros(1))
        with graph.graph.inserting_after(first):
            graph.call(aten.neg.default, (first,))
            writes = graph.call(torch.ops.mixq_test.count.default, (first, counter))
        assert graph.eliminate_dead_code()
        targets = [node.target for node in graph.graph.nodes]
        assert aten.neg.default not in targets
        assert writes.target in targets

    def test_in_place_methods_of_a_torch_level_graph_stay(self) -> None:
        def function(x: torch.Tensor) -> torch.Tensor:
            y = x.clone()
            y.add_(1)
            y[0] = 2
            torch.relu_(y)
            return y

        graph = capture(function, torch.randn(2, 3), route="dynamo")
        before = len(graph.graph.nodes)
        graph.eliminate_dead_code()
        assert len(graph.graph.nodes) == before


def test_a_rewritten_dynamo_graph_compiles_and_computes() -> None:
    model = TwoLayers()
    graphs: list[CapturedGraph] = []

    def backend(module: torch.fx.GraphModule, example_inputs: list) -> object:
        graph = CapturedGraph.from_dynamo(module, example_inputs)
        graphs.append(graph)
        node = linears(graph)[1]
        doubled = graph.attach("second.doubled", graph.tensor(node.args[1]).detach() * 2)
        with graph.graph.inserting_before(node):
            graph.replace(node, graph.call(aten.linear.default, (node.args[0], doubled), like=node))
        module.recompile()
        register_attribute_sources(module, list(graph.attached))
        return torch._dynamo.lookup_backend("aot_eager")(module, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (3, 5):
            x = torch.randn(rows, 8)
            expected = 2 * (model(x) - model.offset) + model.offset
            torch.testing.assert_close(compiled(x), expected)
    assert len(graphs) == 1


def test_a_llama_has_one_real_tensor_behind_each_weight() -> None:
    for graph in map(captured_llama, ROUTES):
        assert len({id(graph.tensor(node.args[1])) for node in linears(graph)}) == 15
