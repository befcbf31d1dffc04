"""Where a graph is lowered, quantizing and refreshing behind it are one call: same numbers, same states."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from compiling import block, rows
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import mixq_compile as mixq
from mixq_compile import ops
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.runtime import compiled_graph
from mixq_compile.runtime.joined_calls import JOINED, join_calls
from mixq_compile.schemes.registry import get_scheme

namespace = torch.ops.mixq


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x))


def siblings() -> nn.Module:
    torch.manual_seed(0)
    return Siblings().eval().requires_grad_(False)


def run(joins: bool, model: nn.Module, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """Results of several calls that meet new columns, and the columns known behind each."""
    joined: list[int] = []
    monkeypatch.setattr(
        compiled_graph, "join_calls", lambda module: joined.append(join_calls(module) if joins else 0)
    )
    fast = torch.compile(
        model, backend="mixq", options={"force": True, "lowering": "eager", **options}, dynamic=False
    )
    found: list[Any] = []
    for columns in ((), (3,), (3, 9), (40,)):
        found.append(fast(rows(columns=columns)[:, :64]))
        found.append([linear.outlier_columns for linear in mixq.report(fast).quantized])
    assert sum(joined) == (2 if joins else 0), joined
    return found


@pytest.mark.parametrize("miss", ["exact", "lazy", "frozen", "per_call"])
@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_results_and_states_are_the_same(miss: str, lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apart, together = (
        run(joins, siblings(), monkeypatch, miss=miss, lowering=lowering) for joins in (False, True)
    )
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_swapped_modules_and_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    apart, together = (
        run(joins, mixq.quantize(siblings()), monkeypatch, lowering="inductor") for joins in (False, True)
    )
    for one, other in zip(apart, together, strict=True):
        assert torch.allclose(one, other, atol=1e-6) if isinstance(one, Tensor) else one == other


def test_people_and_passes_see_two_steps() -> None:
    fast = torch.compile(
        block(), backend="mixq", options={"force": True, "lowering": "eager"}, fullgraph=True
    )
    fast(rows())
    program, history = mixq.compile(mixq.capture(block(), rows()), force=True)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "mixq.quantize_online.default" in targets
    assert "mixq.quantize_and_refresh.default" not in targets
    assert all("quantize_and_refresh" not in row.target for row in history.final.rows)


def tensors() -> dict[str, Any]:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_weight(weight, get_scheme("w8a8o16").recipe)
    state = OutlierState.create(48, 16, 6.0, "cpu")
    return {
        **state.named_buffers(),
        "cached_index": [torch.full((16,), -1, dtype=torch.int32)],
        "outlier_weight": [torch.zeros(32, 16)],
        "weight_codes": [codes],
        "weight_scale": [scale],
        "original": [weight],
    }


def test_the_operator_is_the_two_one_after_the_other() -> None:
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    x[:, 7] = 20
    one, other = tensors(), copy.deepcopy(tensors())
    found = ops.quantize_and_refresh(
        x=x, **one, format="int8", miss="exact", small_m=0, kernel="ref", refresh_kernel="ref"
    )
    state = [other.pop(name) for name in ("index", "column_slot", "column_max", "counters")]
    state.append(other.pop("effective_threshold"))
    wanted = ops.quantize_online(x, *state, "int8", "exact", 0, "ref")
    ops.refresh_outlier_weights(
        codes=wanted[0], index=state[0], count=wanted[3], **other, small_m=0, kernel="ref"
    )
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(one["outlier_weight"][0], other["outlier_weight"][0])
    assert one["cached_index"][0][0] == 7


def test_opcheck() -> None:
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    arguments = (x, *tensors().values(), "int8", "exact", 0, "ref", "ref")
    torch.library.opcheck(JOINED, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("between", ["reads codes", "writes"])
def test_what_lies_between_keeps_them_apart(between: str) -> None:
    made = tensors()
    names = list(made)
    graph = Graph()
    x = graph.placeholder("x")
    nodes = {
        name: [graph.placeholder(name)] if isinstance(made[name], list) else graph.placeholder(name)
        for name in names
    }
    state = [nodes[name] for name in names[:5]]
    quantized = graph.call_function(namespace.quantize_online.default, (x, *state, "int8", "exact", 0, "ref"))
    items = [graph.call_function(operator.getitem, (quantized, place)) for place in range(4)]
    if between == "reads codes":
        other = graph.call_function(torch.ops.aten.neg.default, (items[0],))
    else:
        other = graph.call_function(torch.ops.aten.add_.Tensor, (x, 1))
    graph.call_function(
        namespace.refresh_outlier_weights.default,
        (items[0], nodes["index"], items[3], *(nodes[name] for name in names[5:]), 0, "ref"),
    )
    graph.output((items[0], other))
    assert join_calls(GraphModule(nn.Module(), graph)) == 0
