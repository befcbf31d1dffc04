"""`share-quantize`: who shares one quantization and one state, and who does not and why."""

from __future__ import annotations

import pytest
import torch
from captures import ROUTES, capture
from linear_models import FEATURES, Attention, captured, rows, statistics
from rewriting import CHOSEN, SHARED, WHOLE, call, decisions, mixq_calls, nodes_of, reasons, run, sqnr
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.operands import operand, producer, set_operands
from mixq_compile.pipeline import Fuel, PassContext, PassError, Pipeline
from mixq_compile.pipeline.runner import run_passes
from mixq_compile.runtime.weight_store import STORE, WeightStore


class Reader(nn.Module):
    """Linears that read one value in a given way."""

    def __init__(self, read, count: int = 2) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(count))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, *self.linears)


def shared(route: str, model: nn.Module, text: str = SHARED, **options) -> CapturedGraph:  # type: ignore[no-untyped-def]
    graph = captured(model, route)
    graph.history = run(graph, text, **options)  # type: ignore[attr-defined]
    return graph


@pytest.mark.parametrize("route", ROUTES)
def test_readers_of_one_value_share(route: str) -> None:
    torch.manual_seed(0)
    model, store = Attention(), WeightStore()
    graph = shared(route, model, weights=store)
    assert mixq_calls(graph).count("quantize_online") == 2
    assert mixq_calls(graph).count("refresh_outlier_weights") == 2
    found = reasons(graph.history, "share-quantize")
    assert found == {
        "v_proj": "applied: shares the quantization of k_proj",
        "q_proj": "applied: shares the quantization of k_proj",
    }
    first = nodes_of(graph, "quantize_online")[0]
    states = {id(s): s for w in (model.q_proj, model.k_proj, model.v_proj) for s in store.states([w.weight])}
    joint = [s for s in states.values() if s.index is graph.tensor(operand(first, "index"))]
    assert len(joint) == 1
    x = rows(6, columns=(3,))
    assert sqnr(model(x), call(graph, x)) > 30
    assert joint[0].columns() == [3]


@pytest.mark.parametrize("route", ROUTES)
def test_each_reader_keeps_its_own_outlier_weights(route: str) -> None:
    torch.manual_seed(0)
    model = Attention()
    graph = shared(route, model)
    call(graph, rows(6, columns=(3, 40)))
    refresh = nodes_of(graph, "refresh_outlier_weights")[0]
    caches = [graph.tensor(node) for node in operand(refresh, "outlier_weight")]
    weights = [module.weight for module in (model.k_proj, model.v_proj, model.q_proj)]
    assert len(caches) == 3
    for cache, weight in zip(caches, weights, strict=True):
        assert torch.equal(cache[:, :2], weight[:, [3, 40]])


@pytest.mark.parametrize(
    "options",
    ["layers=k_proj=w4a4o16", "layers=k_proj=w8a8"],
    ids=["other bits", "no outliers"],
)
def test_another_scheme_is_not_shared_and_says_so(options: str) -> None:
    graph = shared("dynamo", Attention(), SHARED.replace("force=true", f"force=true {options}"))
    found = reasons(graph.history, "share-quantize")
    assert found["q_proj"].startswith("applied: shares the quantization of v_proj")
    (kept,) = [each for each in decisions(graph.history, "share-quantize") if each.fqn == "k_proj"]
    (blamed,) = kept.details["blamed"]
    what = "reads a value that others quantize with another scheme, policy or columns"
    assert kept.reason == f"{what}: {blamed}"
    assert kept.verdict == "skipped"
    quantizations = {node.name for node in nodes_of(graph, "quantize_online")}
    assert blamed in quantizations - {kept.node}


def test_other_calibrated_columns_are_not_shared() -> None:
    stats = statistics({"q_proj": {3: 9.0}, "k_proj": {3: 9.0}, "v_proj": {4: 9.0}, "o_proj": {}})
    text = f"{CHOSEN},annotate-outliers,rewrite-mixed-linear,share-quantize"
    graph = shared("dynamo", Attention(), text, stats=stats)
    found = reasons(graph.history, "share-quantize")
    assert found["q_proj"] == "applied: shares the quantization of k_proj"
    assert found["v_proj"].startswith("skipped: reads a value that others quantize")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_smallest_switch_point_serves_all(which: int) -> None:
    """Linears of several widths (q beside narrow k and v) may switch at other numbers of rows."""
    torch.manual_seed(0)
    model, store = Attention(), WeightStore()
    graph = captured(model, "dynamo")
    run(graph, SHARED.removesuffix(",share-quantize"), weights=store)
    places = {"quantize_online": nodes_of(graph, "quantize_online")}
    places["refresh_outlier_weights"] = nodes_of(graph, "refresh_outlier_weights")
    for nodes in places.values():
        for place, node in enumerate(nodes[:3]):
            set_operands(node, small_m=4 if place == which else 16)
    run(graph, f"{SHARED},fuse-epilogue", weights=store)
    for name in places:
        assert operand(nodes_of(graph, name)[0], "small_m") == 4
    assert [operand(node, "small_m") for node in nodes_of(graph, "mixed_linear")][:3] == [4, 4, 4]
    x = rows(6, columns=(3,))
    assert sqnr(model(x), call(graph, x)) > 30


@pytest.mark.parametrize("route", ROUTES)
def test_a_value_that_is_written_in_between_is_not_shared(route: str) -> None:
    def read(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        y = x.clone()
        result = first(y)
        y.view(-1).mul_(2.0)
        return result + second(y)

    torch.manual_seed(0)
    model = Reader(read)
    graph = shared(route, model)
    assert mixq_calls(graph).count("quantize_online") == 2
    assert reasons(graph.history, "share-quantize") == {
        "linears.1": "skipped: the value is changed in place between the two: mul_"
    }
    assert sqnr(model(rows(6)), call(graph, rows(6))) > 30


@pytest.mark.parametrize("route", ROUTES)
def test_a_weight_that_reads_a_value_twice_is_refreshed_once(route: str) -> None:
    model = Reader(lambda x, only: only(x) + only(x).relu(), count=1)
    graph = shared(route, model)
    (refresh,) = nodes_of(graph, "refresh_outlier_weights")
    assert len(operand(refresh, "cached_index")) == 1
    x = rows(6, columns=(3,))
    assert sqnr(model(x), call(graph, x)) > 30


@pytest.mark.parametrize("route", ROUTES)
def test_weights_of_k_by_n_share_too(route: str) -> None:
    """Their 16-bit weights are transposed views, which must stand before the joint refresh."""

    class PlainConv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(FEATURES, 32))
            self.bias = nn.Parameter(torch.randn(32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = PlainConv1D()
            self.other = PlainConv1D()

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) * self.other(x)

    torch.manual_seed(0)
    model = Two()
    graph = shared(route, model)
    assert mixq_calls(graph).count("quantize_online") == 1
    x = rows(6, columns=(3,))
    assert sqnr(model(x), call(graph, x)) > 20


@pytest.mark.parametrize("route", ROUTES)
def test_a_layer_shared_by_depth_has_one_state(route: str) -> None:
    """As in ALBERT: query, key and value of one layer read a new value in every round."""

    class Round(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.layer(x)
            return x

    torch.manual_seed(0)
    model, store = Round(), WeightStore()
    graph = shared(route, model, weights=store)
    points = nodes_of(graph, "quantize_online")
    assert len(points) == 6
    assert len({operand(node, "index") for node in points}) == 2, "the rounds use different states"
    x = rows(6)
    assert sqnr(model(x), call(graph, x)) > 30


@pytest.mark.parametrize("route", ROUTES)
def test_modules_that_were_swapped_share_the_state_of_the_first(route: str) -> None:
    torch.manual_seed(0)
    model = Attention()
    reference = model(rows(6, columns=(3,)))
    mixq.quantize(model)
    graph = capture(model, rows(6), route=route)
    text = "strip-guards,expand-linear,share-quantize"
    history = run(graph, text, weights=STORE)
    assert mixq_calls(graph).count("quantize_online") == 2
    assert len([d for d in decisions(history, "share-quantize") if d.verdict == "applied"]) == 2
    states = [module.outlier_state() for module in (model.q_proj, model.k_proj, model.v_proj)]
    for name in ("index", "column_slot", "column_max", "counters", "effective_threshold"):
        assert len({getattr(state, name).data_ptr() for state in states}) == 1, f"{name} is not shared"
    assert sqnr(reference, call(graph, rows(6, columns=(3,)))) > 30
    assert states[0].columns() == states[1].columns() == [3], (
        "eager modules do not see what the graph learned"
    )


def test_merging_stops_where_fuel_ends_and_the_graph_still_computes() -> None:
    torch.manual_seed(0)
    model = Attention()
    x = rows(6, columns=(3,))
    expected = model(x)
    graph = captured(model, "dynamo")
    total = sum(record.count("applied") for record in run(graph, SHARED).records)
    for rewrites in range(total + 1):
        graph = captured(model, "dynamo")
        run(graph, SHARED, fuel=Fuel(rewrites))
        assert sqnr(expected, call(graph, x)) > 30, f"{rewrites} rewrites"


def test_all_of_it_on_an_attention_block() -> None:
    graph = shared("dynamo", Attention(), WHOLE)
    assert mixq_calls(graph).count("mixed_linear") == 4


def test_every_reading_of_a_result_moves_to_the_shared_one() -> None:
    graph = captured(Attention(), "dynamo")
    store = WeightStore()
    run(graph, SHARED.removesuffix(",share-quantize"), weights=store)
    quantized = nodes_of(graph, "quantize_online")[1]
    dequantized = nodes_of(graph, "dequantize")[1]
    with graph.graph.inserting_after(quantized):
        again = graph.result(quantized, "scale")
    set_operands(dequantized, scale=again)
    run(graph, SHARED, weights=store)
    assert mixq_calls(graph).count("quantize_online") == 2
    assert producer(operand(dequantized, "scale")) is nodes_of(graph, "quantize_online")[0]


SWAPPED = "strip-guards,expand-linear"


def swapped(route: str = "export") -> CapturedGraph:
    torch.manual_seed(0)
    return captured(mixq.quantize(Attention().eval()), route)


def test_a_run_without_a_store_says_what_is_missing() -> None:
    """Where modules bring their own weights no earlier pass needs the store."""
    with pytest.raises(PassError, match=r"share-quantize needs a store .* give PassContext a `weights`"):
        Pipeline.parse(f"{SWAPPED},share-quantize").run(swapped(), PassContext())


def test_a_state_that_is_computed_is_not_joined() -> None:
    graph = swapped()
    run(graph, SWAPPED)
    second = nodes_of(graph, "quantize_online")[1]
    state = operand(second, "column_max")
    with graph.graph.inserting_before(second):
        doubled = graph.call(torch.ops.aten.clone.default, (state,), like=second)
    set_operands(second, column_max=doubled)
    step = Pipeline.parse("share-quantize").passes
    history = run_passes(step, "share-quantize", graph, PassContext(weights=WeightStore()), "full", True)
    (found,) = [each for each in decisions(history, "share-quantize") if each.verdict == "skipped"]
    assert found.reason == f"an outlier state is computed, not a buffer: {doubled.name}"
    assert found.details == {"blamed": [doubled.name]}
    assert operand(second, "column_max") is doubled
