"""`rewrite-mixed-linear`: what a linear becomes, and that it computes the same."""

from __future__ import annotations

import pytest
import torch
from captures import ROUTES
from linear_models import ATTENTION, FEATURES, Attention, captured, network, rows, statistics
from rewriting import BY_MAGNITUDE, CHOSEN, MIXED, WHOLE, call, mixq_calls, nodes_of, reasons, run, sqnr
from torch import Tensor, nn

from mixq_compile.errors import OptionError
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops import providers
from mixq_compile.ops.operands import operand, producer, set_operands
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.ops.providers import Provider
from mixq_compile.passes._mixed_linear import MixedLinear
from mixq_compile.passes.rewrite_mixed_linear import RewriteMixedLinear
from mixq_compile.pipeline import PassContext, PassError, Pipeline
from mixq_compile.pipeline.runner import run_passes
from mixq_compile.runtime.weight_store import WeightStore

PARTS = ["quantize_online", "refresh_outlier_weights", "mixed_gemm", "dequantize"]


def linear_graph(route: str, *, dynamic: bool = False, bias: bool = True) -> tuple[CapturedGraph, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 32, bias=bias))
    return captured(model, route, rows(6), dynamic=dynamic), model


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_three_steps_are_visible(route: str, dynamic: bool) -> None:
    graph, model = linear_graph(route, dynamic=dynamic)
    history = run(graph, MIXED)
    assert mixq_calls(graph) == PARTS
    assert reasons(history, "rewrite-mixed-linear") == {
        "0": "applied: w8a8o16: quantize, mixed_gemm, dequantize"
    }
    x = rows(6, columns=(3, 40))
    assert sqnr(model(x), call(graph, x)) > 35


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("default=w8a8", ["quantize", "mixed_gemm", "dequantize"]),
        ("default=w8a16", ["weight_only_linear"]),
        ("miss=static", ["quantize", *PARTS[1:]]),
        ("miss=per_call", PARTS),
        ("default=w4a8o16", PARTS),
        ("default=w4a4o16", PARTS),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_parts_by_scheme_and_policy(route: str, options: str, parts: list[str]) -> None:
    graph, model = linear_graph(route)
    run(graph, CHOSEN.replace("force=true", f"force=true {options}") + ",rewrite-mixed-linear{kernel=ref}")
    assert mixq_calls(graph) == parts
    assert sqnr(model(rows(6)), call(graph, rows(6))) > (12 if "w4" in options else 35)


def test_outlier_columns_of_the_input_are_found_while_running() -> None:
    graph, _ = linear_graph("dynamo")
    run(graph, MIXED)
    (quantized,) = nodes_of(graph, "quantize_online")
    x = rows(6, columns=(3, 40))
    call(graph, x)
    counters, index = (graph.tensor(operand(quantized, name)) for name in ("counters", "index"))
    assert index[: counters[0]].tolist() == [3, 40]


def test_a_quantization_takes_the_states_buffers() -> None:
    graph, model = linear_graph("dynamo")
    store = WeightStore()
    run(graph, MIXED, weights=store)
    (quantized,) = nodes_of(graph, "quantize_online")
    (state,) = store.states([model[0].weight])
    given = [graph.tensor(operand(quantized, name)) for name in STATE_FIELDS]
    assert all(mine is theirs for mine, theirs in zip(given, state.buffers(), strict=True))


@pytest.mark.parametrize(
    ("originals", "expected"), [(True, "the weight"), (False, "an empty tensor")], ids=["kept", "codes"]
)
def test_the_source_of_outlier_weights(originals: bool, expected: str) -> None:
    graph, model = linear_graph("dynamo")
    run(graph, f"{CHOSEN},rewrite-mixed-linear{{kernel=ref originals={str(originals).lower()}}}")
    (refresh,) = nodes_of(graph, "refresh_outlier_weights")
    (original,) = operand(refresh, "original")
    assert graph.tensor(original) is model[0].weight if originals else graph.value(original).numel() == 0
    assert sqnr(model(rows(6, columns=(3,))), call(graph, rows(6, columns=(3,)))) > 30


def test_calibrated_columns_start_in_the_cache() -> None:
    model = network()
    store = WeightStore()
    stats = statistics({name: {3: 9.0, 40: 30.0} for name in ATTENTION})
    graph = captured(model, "dynamo")
    run(graph, f"{BY_MAGNITUDE},annotate-outliers,rewrite-mixed-linear", stats=stats, weights=store)
    (state, *_) = store.states([model.attn.q_proj.weight])
    packed = next(iter(store._entry(model.attn.q_proj.weight).packed.values()))
    assert state.columns() == [3, 40]
    assert state.column_max[:2].tolist() == [9.0, 30.0]
    assert packed.cached_index[:3].tolist() == [3, 40, -1]
    assert torch.equal(packed.outlier_weight[:, :2], model.attn.q_proj.weight[:, [3, 40]])


@pytest.mark.parametrize("miss", ["exact", "frozen", "static"])
def test_fixed_policies_with_calibration_learn_nothing(miss: str) -> None:
    model = network()
    store = WeightStore()
    stats = statistics({name: {3: 9.0} for name in ATTENTION})
    graph = captured(model, "dynamo")
    run(graph, WHOLE.replace("force=true", f"force=true miss={miss}").replace(
        ",rewrite", ",annotate-outliers,rewrite"), stats=stats, weights=store)  # fmt: skip
    call(graph, rows(6, columns=(3, 20)))
    (product, *_) = nodes_of(graph, "mixed_linear")
    index = graph.tensor(operand(producer(operand(product, "codes")), "index"))
    (state,) = (s for s in store.states([model.attn.k_proj.weight]) if s.index is index)
    assert state.columns() == ([3, 20] if miss == "exact" else [3])


class TestSmallBatches:
    """The switch to the weight-only kernel, by what the provider says."""

    @pytest.fixture(autouse=True)
    def sixteen(self, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
        providers.load_providers()
        kernels = providers._PROVIDERS["mixed_linear"]
        ref = kernels["ref"]
        fast = Provider("mixed_linear", "ref", ref.function, ref.supports, 0, None, lambda query: 16)
        monkeypatch.setitem(kernels, "ref", fast)
        providers.choose.cache_clear()
        yield
        providers.choose.cache_clear()

    @pytest.mark.parametrize(("count", "parts"), [(16, ["weight_only_linear"]), (17, PARTS)])
    def test_fixed_rows_decide_when_compiling(self, count: int, parts: list[str]) -> None:
        graph = captured(nn.Sequential(nn.Linear(FEATURES, 32)), "dynamo", rows(count))
        run(graph, MIXED)
        assert mixq_calls(graph) == parts

    def test_several_dimensions_are_multiplied(self) -> None:
        graph = captured(nn.Sequential(nn.Linear(FEATURES, 32)), "dynamo", rows(2, 3, 3))
        run(graph, MIXED)
        assert mixq_calls(graph) == PARTS

    def test_symbolic_rows_decide_in_the_call(self) -> None:
        graph, model = linear_graph("dynamo", dynamic=True)
        run(graph, WHOLE)
        (quantized,) = nodes_of(graph, "quantize_online")
        (product,) = nodes_of(graph, "mixed_linear")
        (refresh,) = nodes_of(graph, "refresh_outlier_weights")
        assert [operand(node, "small_m") for node in (quantized, product, refresh)] == [16, 16, 16]
        counters = graph.tensor(operand(quantized, "counters"))
        few, many = rows(6, columns=(3,)), rows(30, columns=(3,))
        assert sqnr(model(few), call(graph, few)) > 40
        assert int(counters[0]) == 0, "a call of few rows learned a column"
        assert sqnr(model(many), call(graph, many)) > 35
        assert int(counters[0]) == 1

    def test_one_kernel_for_all_where_the_batch_must_not_matter(self) -> None:
        graph = captured(nn.Sequential(nn.Linear(FEATURES, 32)), "dynamo", rows(4))
        run(graph, f"{CHOSEN},rewrite-mixed-linear{{kernel=ref batch_invariant=true}}")
        assert mixq_calls(graph) == PARTS
        (quantized,) = nodes_of(graph, "quantize_online")
        assert operand(quantized, "small_m") == 0


@pytest.mark.parametrize("route", ROUTES)
def test_an_input_that_others_read_is_seen_whole(route: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(FEATURES, FEATURES)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + x.exp() + x

    model = Residual()
    graph = captured(model, route)
    run(graph, WHOLE)
    x = rows(6, columns=(3,))
    kept = x.clone()
    result = call(graph, x)
    assert torch.equal(x, kept), "the input was changed"
    assert sqnr(model(x), result) > 35


@pytest.mark.parametrize("route", ROUTES)
def test_a_layer_that_is_called_twice_is_packed_once(route: str) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, FEATURES)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    torch.manual_seed(0)
    model, store = Shared(), WeightStore()
    graph = captured(model, route)
    run(graph, WHOLE, weights=store)
    first, second = nodes_of(graph, "mixed_linear")
    codes, caches = (
        [operand(node, name) for node in (first, second)] for name in ("weight_codes", "outlier_weight")
    )
    assert codes[0] is codes[1], "two copies of the codes"
    assert caches[0] is caches[1], "two caches of outlier weights"
    assert len(store.codes(model.layer.weight)) == 1
    assert sqnr(model(rows(6)), call(graph, rows(6))) > 35


def test_nodes_keep_the_name_and_line_of_their_linear() -> None:
    graph = captured(network(), "dynamo")
    run(graph, MIXED)
    for node in nodes_of(graph, "mixed_gemm"):
        view = Annotations(node)
        assert view.fqn in ATTENTION
        assert view.scheme == "w8a8o16"
        assert view.origin == ["canonicalize-linear", "rewrite-mixed-linear"]
        assert "linear_models.py" in graph.location(node)


def test_an_attention_block_computes_the_same() -> None:
    torch.manual_seed(0)
    model = Attention()
    graph = captured(model, "export", dynamic=True)
    run(graph, WHOLE)
    for count in (6, 11, 1):
        x = rows(count, columns=(3, 40))
        assert sqnr(model(x), call(graph, x)) > 30


def test_a_weight_that_is_computed_is_left_alone_and_says_why() -> None:
    """As where a pass of the user's puts a scaled weight in place of the parameter after the schemes."""
    graph, model = linear_graph("dynamo")
    run(graph, CHOSEN)
    (linear,) = graph.walk(torch.ops.aten.linear.default)
    with graph.graph.inserting_before(linear):
        doubled = graph.call(torch.ops.aten.mul.Tensor, (operand(linear, "weight"), 2.0))
    set_operands(linear, weight=doubled)
    step = RewriteMixedLinear()
    history = run_passes([step], step.spec(), graph, PassContext(weights=WeightStore()), "full", True)
    assert reasons(history, "rewrite-mixed-linear") == {
        "0": "skipped: its weight is computed, not a parameter: only parameters can be packed"
    }
    x = rows(6)
    with torch.no_grad():
        assert torch.equal(call(graph, x), nn.functional.linear(x, 2.0 * model[0].weight, model[0].bias))


def test_a_run_without_a_store_says_what_is_missing() -> None:
    graph, _ = linear_graph("dynamo")
    with pytest.raises(PassError, match="no store for them: give PassContext a `weights`"):
        Pipeline.parse(MIXED).run(graph, PassContext())


def test_an_operand_that_no_step_takes_is_refused() -> None:
    """It would be left out of the product without a word."""
    graph, _ = linear_graph("dynamo")
    node = next(iter(graph.graph.nodes))
    parts = MixedLinear({"x": node, "zero_point": node}, 8, None, None, 0)
    with pytest.raises(OptionError, match="unknown operand of a quantized linear 'zero_point'"):
        parts.write(graph, lambda operator, named: node)
