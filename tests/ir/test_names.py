import pytest
import torch
from captures import ROUTES, TwoLayers, capture, captured_llama, linears
from torch import nn

from mixq_compile.ir.names import is_owned_tensor, normalise_fqn, split_source


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("L['self'].model.layers.0", "model.layers.0"),
        ("L['self']._modules['0']._parameters['weight']", "0.weight"),
        ("L['self']._modules['layers']._modules['1']._buffers['mask']", "layers.1.mask"),
        ("L['self'].layers[0].proj", "layers.0.proj"),
        ("L['self'].layers.slice(None, 2, None)[0].proj", "layers.0.proj"),
        ("L['fn'].0.1", "0.1"),
        ("L['fn']", ""),
        ("G['model'].head", "head"),
        ("getattr(L['self'].layers, '0').proj", "layers.0.proj"),
        ("getattr(getattr(L['self'], 'layers'), '0')", "layers.0"),
        ("L['fn'].__closure__[0].cell_contents._modules['0']", "0"),
        ("L['fn'].__globals__['model']._modules['0']", "0"),
        ("L['fn'].__self__._modules['head']", "head"),
        ("L['self']._orig_mod.model.head", "model.head"),
        ("model._orig_mod.head", "model.head"),
        ("L__self__model.layers.0", "model.layers.0"),
        ("L__self___model.layers.0", "model.layers.0"),
        ("L__self__", ""),
        ("model.layers.0@1", "model.layers.0"),
        ("model.layers.0", "model.layers.0"),
        ("", ""),
    ],
)
def test_sources_and_paths_have_one_normal_form(written: str, name: str) -> None:
    assert normalise_fqn(written) == name
    assert normalise_fqn(name) == name


def test_a_text_that_is_no_name_stays_as_it_is() -> None:
    assert normalise_fqn("not a name!") == "not a name!"


def test_the_root_of_a_source_is_the_variable_that_holds_the_model() -> None:
    assert split_source("G['model'].head") == ("model", "head")
    assert split_source("model.head") == ("", "model.head")


@pytest.mark.parametrize(
    ("source", "owned"),
    [
        ("L['self']._modules['0']._parameters['weight']", True),
        ("G['m']._buffers['scale']", True),
        ("L['x']", False),
        ("L['kwargs']['input_ids']", False),
        ("L['self'].cache", False),
    ],
)
def test_only_parameters_and_buffers_of_modules_are_owned(source: str, owned: bool) -> None:
    assert is_owned_tensor(source) is owned


def test_both_routes_give_a_llama_the_same_names() -> None:
    named = [{graph.fqn(node) for node in linears(graph)} for graph in map(captured_llama, ROUTES)]
    parts = [
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.{what}_proj" for what in ("gate", "up", "down")),
    ]
    expected = {f"model.layers.{layer}.{part}" for layer in (0, 1) for part in parts} | {"lm_head"}
    assert named == [expected, expected]


def test_both_routes_give_a_llamas_parameters_the_names_of_the_model() -> None:
    for graph in map(captured_llama, ROUTES):
        weights = {graph.parameter_name(node.args[1]) for node in linears(graph)}
        assert weights == {f"{graph.fqn(node)}.weight" for node in linears(graph)}


@pytest.mark.parametrize("route", ROUTES)
def test_a_nested_sequential_is_named_by_its_indexes(route: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 3)))
    graph = capture(module, torch.randn(2, 4), route=route)
    assert [graph.fqn(node) for node in linears(graph)] == ["0", "1.1"]
    assert [graph.parameter_name(node.args[1]) for node in linears(graph)] == ["0.weight", "1.1.weight"]


def test_a_function_of_one_model_names_layers_as_the_model_does() -> None:
    model = TwoLayers()
    graph = capture(lambda x: model(x) * 2, torch.randn(2, 8), route="dynamo")
    assert [graph.fqn(node) for node in linears(graph)] == ["first", "second"]


def test_a_function_of_two_models_names_them_apart() -> None:
    one, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    graph = capture(lambda x: one(other(x)), torch.randn(2, 4), route="dynamo")
    names = [graph.fqn(node) for node in linears(graph)]
    assert len(set(names)) == 2
    assert all(name.endswith("0") for name in names)


@pytest.mark.parametrize("route", ROUTES)
def test_a_linear_without_a_module_of_its_own_is_named_by_who_calls_it(route: str) -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight)

    graph = capture(nn.Sequential(nn.Linear(8, 8), Router()), torch.randn(2, 8), route=route)
    assert [graph.fqn(node) for node in linears(graph)] == ["0", "1"]
    assert [graph.owner_is_linear(node) for node in linears(graph)] == [True, False]


@pytest.mark.parametrize("route", ROUTES)
def test_a_node_knows_the_models_python_line(route: str) -> None:
    graph = capture(TwoLayers(), torch.randn(2, 8), route=route)
    first, second = (graph.location(node) for node in linears(graph))
    assert "captures.py" in first
    assert first.endswith("in forward: hidden = torch.relu(self.first(x))")
    assert second.endswith("in forward: return self.second(hidden) + self.offset")
