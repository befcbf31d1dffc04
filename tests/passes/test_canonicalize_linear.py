"""`canonicalize-linear`: every spelling of a linear, by both routes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captures import ROUTES, capture
from rewriting import NAMED, call, calls, decisions, linear_names, run
from torch import Tensor, nn
from torch.nn.functional import linear

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.operands import operand
from mixq_compile.pipeline import Fuel, PassContext, Pipeline
from mixq_compile.pipeline.bisection import rewrites

aten = torch.ops.aten
LINEAR = "aten.linear.default"


class OwnLinear(nn.Module):
    """A linear of its own making: its class is named like one, its forward is a spelling."""

    def __init__(self, spelling: Callable[[Tensor, nn.Module], Tensor], transposed: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((24, 16) if transposed else (16, 24)))
        self.bias = nn.Parameter(torch.randn(16))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x, self)


class Model(nn.Module):
    """One linear, named `mlp.up_proj`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.up_proj = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.mlp.up_proj(x))


def _in_place(x: Tensor, m: nn.Module) -> Tensor:
    product = x @ m.weight.T
    product += m.bias
    return product


WITH_BIAS = {
    "linear": lambda x, m: linear(x, m.weight, m.bias),
    "linear with names": lambda x, m: linear(input=x, weight=m.weight, bias=m.bias),
    "addmm": lambda x, m: torch.addmm(m.bias, x, m.weight.t()),
    "matmul and add": lambda x, m: x @ m.weight.t() + m.bias,
    "add and matmul": lambda x, m: m.bias + torch.matmul(x, m.weight.T),
    "add in place": _in_place,
    "torch.add": lambda x, m: torch.add(torch.mm(x, m.weight.T), m.bias),
}
WITHOUT_BIAS = {
    "linear": lambda x, m: linear(x, m.weight),
    "matmul T": lambda x, m: torch.matmul(x, m.weight.T),
    "matmul mT": lambda x, m: x.matmul(m.weight.mT),
    "mm t": lambda x, m: torch.mm(x, m.weight.t()),
    "method mm": lambda x, m: x.mm(m.weight.t()),
    "transpose": lambda x, m: x @ m.weight.transpose(0, 1),
    "negative transpose": lambda x, m: x @ m.weight.transpose(-1, -2),
    "permute": lambda x, m: x @ m.weight.permute(1, 0),
}
CONV1D = {
    "addmm": lambda x, m: torch.addmm(m.bias, x, m.weight),
    "views": lambda x, m: torch.addmm(m.bias, x.view(-1, 24), m.weight).view(*x.shape[:-1], 16),
    "matmul": lambda x, m: x @ m.weight + m.bias,
}


def check(route: str, inner: nn.Module, has_bias: bool) -> None:
    torch.manual_seed(0)
    model, x = Model(inner), torch.randn(3, 24)
    graph = capture(model, x, route=route)
    history = run(graph, NAMED)
    assert linear_names(graph) == {"mlp.up_proj": "up"}
    (node,) = graph.walk(aten.linear.default)
    assert (len(node.args) > 2 and node.args[2] is not None) == has_bias, "the bias was lost or invented"
    products = [name for name in calls(graph) if any(word in name for word in ("mm", "matmul", "add"))]
    assert products == [], "the product that the linear replaces is still there"
    assert [d.verdict for d in decisions(history, "canonicalize-linear")] == ["applied"]
    torch.testing.assert_close(call(graph, x), model(x).detach())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spelling", WITH_BIAS)
def test_spellings_with_bias(route: str, spelling: str) -> None:
    check(route, OwnLinear(WITH_BIAS[spelling]), has_bias=True)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spelling", WITHOUT_BIAS)
def test_spellings_without_bias(route: str, spelling: str) -> None:
    check(route, OwnLinear(WITHOUT_BIAS[spelling]), has_bias=False)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spelling", CONV1D)
def test_weights_of_k_by_n(route: str, spelling: str) -> None:
    check(route, OwnLinear(CONV1D[spelling], transposed=True), has_bias=True)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bias", [True, False])
def test_modules(route: str, bias: bool) -> None:
    check(route, nn.Linear(24, 16, bias=bias), has_bias=bias)


@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (2, 1, 3, 24)], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_any_number_of_dimensions(route: str, shape: tuple[int, ...]) -> None:
    model, x = Model(OwnLinear(WITH_BIAS["matmul and add"])), torch.randn(shape)
    graph = capture(model, x, route=route)
    run(graph, NAMED)
    assert calls(graph).count(LINEAR) == 1
    torch.testing.assert_close(call(graph, x), model(x).detach())


def test_a_call_of_a_module_in_a_traced_graph() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(24, 16), nn.ReLU()))
    graph = CapturedGraph(traced, "export")
    x = torch.randn(3, 24)
    placeholder = next(iter(graph.graph.nodes))
    graph.set_value(placeholder, graph.fake_mode.from_tensor(x))
    run(graph, "canonicalize-linear")
    assert linear_names(graph) == {"0": "other"}
    assert [node.op for node in graph.graph.nodes].count("call_module") == 1
    expected = nn.Sequential(*traced.children())(x)
    assert torch.equal(call(graph, x), expected.detach())


NOT_LINEARS = {
    "two activations": lambda x, m: x @ x.T,
    "scaled addmm": lambda x, m: torch.addmm(m.bias, x, m.weight.t(), beta=2),
    "computed weight": lambda x, m: x @ (m.weight * 2).T,
    "product of parameters": lambda x, m: x.sum() + m.weight.T @ m.weight,
    "weight first": lambda x, m: m.weight @ x.T,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spelling", NOT_LINEARS)
def test_other_products_are_left_alone(route: str, spelling: str) -> None:
    model, x = Model(OwnLinear(NOT_LINEARS[spelling])), torch.randn(3, 24)
    graph = capture(model, x, route=route)
    before = calls(graph)
    history = run(graph, "canonicalize-linear")
    assert calls(graph) == before
    assert decisions(history, "canonicalize-linear") == []


BIASES_THAT_STAY = {
    "product read twice": lambda x, m: (product := x @ m.weight.T) + m.bias + product.sum(),
    "scalar": lambda x, m: x @ m.weight.T + 1.0,
    "scaled": lambda x, m: torch.add(x @ m.weight.T, m.bias, alpha=2),
    "one element": lambda x, m: x @ m.weight.T + m.bias[:1],
    "in double": lambda x, m: x @ m.weight.T + m.bias.double(),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spelling", BIASES_THAT_STAY)
def test_additions_that_are_no_bias_stay_behind_the_linear(route: str, spelling: str) -> None:
    model, x = Model(OwnLinear(BIASES_THAT_STAY[spelling])), torch.randn(3, 24)
    graph = capture(model, x, route=route)
    run(graph, NAMED)
    (node,) = graph.walk(aten.linear.default)
    assert len(node.args) < 3 or node.args[2] is None
    torch.testing.assert_close(call(graph, x), model(x).detach())


def test_a_bias_of_another_dtype_is_no_bias() -> None:
    inner = OwnLinear(WITH_BIAS["matmul and add"]).to(torch.bfloat16)
    inner.bias.data = inner.bias.data.float()
    model, x = Model(inner), torch.randn(3, 24, dtype=torch.bfloat16)
    for route in ROUTES:
        graph = capture(model, x, route=route)
        run(graph, NAMED)
        (node,) = graph.walk(aten.linear.default)
        assert len(node.args) < 3 or node.args[2] is None
        torch.testing.assert_close(call(graph, x), model(x).detach())


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 24))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


@pytest.mark.parametrize("route", ROUTES)
def test_a_product_that_no_linear_module_owns_is_a_router(route: str) -> None:
    graph = capture(Model(Router()), torch.randn(3, 24), route=route)
    run(graph, NAMED)
    assert linear_names(graph) == {"mlp.up_proj": "router"}


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


def test_a_linear_under_autocast_is_left_alone_and_says_why() -> None:
    graph = capture(Autocast(), torch.randn(3, 24), route="dynamo")
    history = run(graph, f"{NAMED},select-scheme{{force=true}}")
    (found,) = history.decisions("inner")
    assert found.verdict == "skipped"
    assert "as under autocast: cast the model itself instead" in found.reason


def test_a_linear_called_under_autocast_is_left_alone_too() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        graph = capture(nn.Sequential(nn.Linear(24, 16)), torch.randn(3, 24), route="dynamo")
    history = run(graph, f"{NAMED},select-scheme{{force=true}}")
    assert [d.verdict for d in history.decisions("0")] == ["skipped"]


def test_a_linear_in_a_region_with_a_graph_of_its_own_is_named() -> None:
    graph = capture(Autocast(), torch.randn(3, 24), route="export")
    history = run(graph, NAMED)
    (decision,) = (d for d in history.decisions() if d.verdict == "skipped")
    assert decision.fqn == "inner"
    assert "as under autocast: cast the model itself instead" in decision.reason


@pytest.mark.parametrize("route", ROUTES)
def test_a_second_run_changes_nothing(route: str) -> None:
    model = nn.Sequential(nn.Linear(24, 24), OwnLinear(CONV1D["addmm"], transposed=True))
    graph = capture(model, torch.randn(3, 24), route=route)
    run(graph, NAMED)
    nodes = list(graph.graph.nodes)
    history = run(graph, NAMED)
    assert list(graph.graph.nodes) == nodes
    assert decisions(history, "canonicalize-linear") == []


def test_new_nodes_keep_line_module_and_annotations() -> None:
    model = Model(OwnLinear(WITH_BIAS["matmul and add"]))
    graph = capture(model, torch.randn(3, 24), route="dynamo")
    run(graph, NAMED)
    (node,) = graph.walk(aten.linear.default)
    assert "test_canonicalize_linear.py" in graph.location(node)
    assert graph.fqn(node) == "mlp.up_proj"
    assert Annotations(node).origin == ["canonicalize-linear"]


@pytest.mark.parametrize("route", ROUTES)
def test_experts_are_named_and_left_alone(route: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    graph = capture(model, input_ids=torch.randint(0, 50, (2, 6)), route=route)
    history = run(graph, NAMED)
    skipped = {d.fqn: d.reason for d in decisions(history, "canonicalize-linear") if d.verdict == "skipped"}
    names = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    assert skipped == dict.fromkeys(names, "unsupported: grouped (one product for several experts)")
    assert linear_names(graph)["model.layers.0.mlp.gate"] == "router"


def test_a_module_call_gets_its_weight_only_after_it_is_announced() -> None:
    """A graph that torch.fx traced calls modules; their weights have no nodes before."""

    def traced() -> CapturedGraph:
        drawing = torch.fx.Graph()
        x = drawing.placeholder("x")
        drawing.output(drawing.call_module("0", (x,)))
        graph = CapturedGraph(torch.fx.GraphModule(nn.Sequential(nn.Linear(4, 3)), drawing), "export")
        for node, shape in zip(graph.graph.nodes, ((2, 4), (2, 3)), strict=False):
            graph.set_value(node, graph.fake_mode.from_tensor(torch.empty(shape)))
        return graph

    for fuel, expected in ((0, ["placeholder", "call_module", "output"]), (1, None)):
        graph = traced()
        context = PassContext(fuel=Fuel(fuel))
        history = Pipeline.parse("canonicalize-linear").run(graph, context, verify="off")
        kinds = [node.op for node in graph.graph.nodes]
        if expected is not None:
            assert (kinds, graph.attached) == (expected, {}), "changed before it was announced"
        else:
            assert kinds == ["placeholder", "get_attr", "get_attr", "call_function", "output"]
            (linear,) = graph.walk(torch.ops.aten.linear.default)
            assert graph.tensor(operand(linear, "weight")) is graph.module.get_submodule("0").weight
            (found,) = rewrites(Pipeline.parse("canonicalize-linear"), history)
            assert (found.number, found.decision.verdict) == (1, "applied")
