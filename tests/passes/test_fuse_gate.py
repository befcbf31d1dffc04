"""`fuse-gate`: which gated products are found in real captures, which are not and why, and the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captures import ROUTES, capture
from linear_models import FEATURES, captured, rows
from rewriting import FUSED, call, calls, decisions, mixq_calls, run, sqnr
from tiny_llama import ids, tiny_llama
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import Fuel
from mixq_compile.runtime.linear_records import linear_records
from mixq_compile.runtime.weight_store import STORE, WeightStore

END = "select-kernels{kernel=ref},prune-dead-weights,verify"
TOGETHER = f"{FUSED},merge-siblings{{when=always}},fuse-gate{{when=always}},{END}"
APART = TOGETHER.replace("fuse-gate{when=always}", "fuse-gate{when=never}")
silu, gelu = nn.functional.silu, nn.functional.gelu


class FeedForward(nn.Module):
    """Gates and values of one input, by two linears or by one."""

    def __init__(self, combine: Callable[..., Tensor], joint: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.combine = combine
        widths = (96,) if joint else (48, 48)
        self.linears = nn.ModuleList(nn.Linear(FEATURES, width, bias=bias) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(*(linear(x) for linear in self.linears))


def chunked(y: Tensor) -> Tensor:
    gates, values = y.chunk(2, dim=-1)
    return values * silu(gates)


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "gate and up": ("silu", lambda: FeedForward(lambda gate, up: silu(gate) * up)),
    "up behind": ("silu", lambda: FeedForward(lambda gate, up: up * silu(gate))),
    "biases": ("silu", lambda: FeedForward(lambda gate, up: silu(gate) * up, bias=True)),
    "gelu": ("gelu", lambda: FeedForward(lambda gate, up: gelu(gate) * up)),
    "tanh": ("gelu_tanh", lambda: FeedForward(lambda gate, up: gelu(gate, approximate="tanh") * up)),
    "relu": ("relu", lambda: FeedForward(lambda gate, up: torch.relu(gate) * up)),
    "one linear": ("silu", lambda: FeedForward(chunked, joint=True)),
}


def rewritten(model: nn.Module, text: str, route: str = "dynamo", **options: Any) -> CapturedGraph:
    graph = captured(model.eval(), route, rows(6, columns=(3, 40)), dynamic=options.pop("dynamic", False))
    graph.history = run(graph, text, weights=WeightStore(), **options)  # type: ignore[attr-defined]
    return graph


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MODELS)
def test_a_gate_goes_into_the_product(name: str, route: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    function, make = MODELS[name]
    model, x = make(), rows(6, columns=(3, 40))
    apart, together = (rewritten(model, text, route, dynamic=dynamic) for text in (APART, TOGETHER))
    (decision,) = decisions(together.history, "fuse-gate")  # type: ignore[attr-defined]
    assert decision.reason == f"{function} of the gates and their product go into the kernel"
    assert mixq_calls(together)[-1] == "activated_linear"
    assert "mixed_linear" not in mixq_calls(together)
    assert calls(together)[-1].startswith("mixq.activated_linear"), "nothing of the gate stays behind"
    for turn in range(2):
        torch.testing.assert_close(call(together, x), call(apart, x), msg=f"call {turn}")


@pytest.mark.parametrize("route", ROUTES)
def test_a_llama(route: str) -> None:
    model = tiny_llama()
    graphs = [capture(model, input_ids=ids(), use_cache=False, route=route) for _ in range(2)]
    for graph, text in zip(graphs, (APART, TOGETHER), strict=True):
        graph.history = run(graph, text, weights=WeightStore())  # type: ignore[attr-defined]
    assert mixq_calls(graphs[1]).count("activated_linear") == 2
    if route == "dynamo":
        assert sqnr(*(call(graph, ids()) for graph in graphs)) > 80


def test_swapped_modules() -> None:
    torch.manual_seed(0)
    model = FeedForward(lambda gate, up: silu(gate) * up).eval()
    expected = model(rows(6))
    mixq.quantize(model)
    graph = captured(model, "dynamo")
    head = "strip-guards,expand-linear,share-quantize,fuse-epilogue,merge-siblings{when=always}"
    run(graph, f"{head},fuse-gate{{when=always}},{END}", weights=STORE)
    assert mixq_calls(graph)[-1] == "activated_linear"
    assert sqnr(expected, call(graph, rows(6))) > 30


def test_the_records_still_know_both_linears() -> None:
    graph = rewritten(MODELS["gate and up"][1](), TOGETHER)
    found = {record.fqn: (record.out_features, record.scheme) for record in linear_records(graph)}
    assert found == {"linears.0": (48, "w8a8o16"), "linears.1": (48, "w8a8o16")}


def reason(combine: Callable[..., Tensor], joint: bool = False, text: str = TOGETHER) -> str:
    torch.manual_seed(0)
    model = FeedForward(combine, joint).eval()
    graph = rewritten(model, text)
    assert sqnr(model(rows(6)), call(graph, rows(6))) > 25
    (decision,) = decisions(graph.history, "fuse-gate")  # type: ignore[attr-defined]
    assert decision.verdict == "skipped"
    return decision.reason


def test_what_others_read_stays() -> None:
    def leaks_values(gate: Tensor, up: Tensor) -> Tensor:
        return silu(gate) * up + up

    def leaks_gates(gate: Tensor, up: Tensor) -> Tensor:
        activated = silu(gate)
        return activated * up + activated

    assert reason(leaks_values).startswith("something else reads the gates or the values: add")
    assert reason(leaks_gates).startswith("something else reads the gates or the values: add")


def test_what_is_no_gate_stays() -> None:
    swapped = "the gates are not the first half of the product"
    assert reason(lambda values, gates: silu(gates) * values).startswith(f"{swapped}: slice_tensor")
    no_halves = "gates and values are not the halves of one product"
    assert reason(lambda gate, up: silu(gate) * up.sigmoid()) == f"{no_halves}: slice_tensor_4, sigmoid"
    other = reason(lambda y: silu(y[..., :32]) * y[..., 32:64], joint=True)
    assert other == f"{no_halves}: getitem, getitem_1"


def test_without_a_kernel_or_turned_off_nothing_changes() -> None:
    auto = TOGETHER.replace("fuse-gate{when=always}", "fuse-gate")
    found = reason(lambda gate, up: silu(gate) * up, text=auto)
    assert found.startswith("no kernel does both on cpu (tl: ")
    assert reason(lambda gate, up: silu(gate) * up, text=APART) == "turned off"


def test_fuel_stops_it() -> None:
    model = MODELS["gate and up"][1]()
    graph = rewritten(model, TOGETHER, fuel=Fuel(0))
    assert "activated_linear" not in mixq_calls(graph)
