"""`merge-siblings`: who is merged, who is not and why, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captures import ROUTES, capture
from linear_models import FEATURES, Attention, captured, rows, statistics
from rewriting import CHOSEN, FUSED, call, decisions, mixq_calls, nodes_of, reasons, run, sqnr
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.formats import INT8
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops import providers
from mixq_compile.ops.operands import listed_operands, operand
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.pipeline import Fuel
from mixq_compile.runtime.weight_store import STORE, WeightStore

END = "select-kernels{kernel=ref},prune-dead-weights,verify"
MERGED = f"{FUSED},merge-siblings{{when=always}},{END}"
APART = f"{FUSED},merge-siblings{{when=never}},{END}"
SWAPPED = f"strip-guards,expand-linear,share-quantize,fuse-epilogue,merge-siblings{{when=always}},{END}"


class Readers(nn.Module):
    """Linears of given widths that read one value in a given way."""

    def __init__(
        self, widths: tuple[int, ...], biases: tuple[bool, ...], read: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            nn.Linear(FEATURES, width, bias=bias) for width, bias in zip(widths, biases, strict=True)
        )
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, *self.linears)


def readers(
    read: Callable[..., Tensor], widths: tuple[int, ...] = (64, 64), biases: tuple[bool, ...] | None = None
) -> Readers:
    torch.manual_seed(0)
    return Readers(widths, biases or (False,) * len(widths), read).eval()


def gated(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    return torch.nn.functional.silu(gate(x)) * up(x)


def joined(x: Tensor, *linears: nn.Module) -> Tensor:
    return torch.cat([linear(x) * 2.0 for linear in linears], dim=-1)


def rewritten(model: nn.Module, route: str, text: str, **options: Any) -> CapturedGraph:
    shape = options.pop("shape", (6,))
    graph = captured(model, route, rows(*shape), dynamic=options.pop("dynamic", False))
    graph.history = run(graph, text, **options)  # type: ignore[attr-defined]
    return graph


def decided(graph: CapturedGraph) -> dict[str, str]:
    return reasons(graph.history, "merge-siblings")  # type: ignore[attr-defined]


CASES: dict[str, Callable[[], nn.Module]] = {
    "gate and up": lambda: readers(gated),
    "grouped queries": lambda: readers(joined, (64, 16, 16)),
    "odd widths": lambda: readers(joined, (37, 51, 19)),
    "biases": lambda: readers(joined, (64, 16, 16), (True, True, True)),
    "some biases": lambda: readers(joined, (64, 16, 16), (True, False, True)),
    "attention": Attention,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", CASES)
def test_the_result_and_the_state_are_the_same_bits(case: str, route: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    model = CASES[case]()
    x = rows(6, columns=(3, 40))
    apart, merged = (
        rewritten(model, route, text, weights=WeightStore(), dynamic=dynamic) for text in (APART, MERGED)
    )
    assert len(nodes_of(merged, "mixed_linear")) < len(nodes_of(apart, "mixed_linear"))
    for turn in range(2):
        assert torch.equal(call(apart, x), call(merged, x)), f"call {turn}"
    for name in STATE_FIELDS:
        one, other = (
            graph.tensor(operand(nodes_of(graph, "quantize_online")[0], name)) for graph in (apart, merged)
        )
        assert torch.equal(one, other), f"{name} differs"
    assert sqnr(model(x), call(merged, x)) > 30


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8o16"])
def test_every_scheme_merges(scheme: str) -> None:
    model = readers(joined, (64, 16, 16))
    x = rows(6, columns=(3,))
    texts = [text.replace("{force=true}", f"{{force=true default={scheme}}}") for text in (APART, MERGED)]
    apart, merged = (rewritten(model, "dynamo", text, weights=WeightStore()) for text in texts)
    operator = "weight_only_linear" if scheme == "w8a16" else "mixed_linear"
    assert [len(nodes_of(graph, operator)) for graph in (apart, merged)] == [3, 1]
    assert torch.equal(call(apart, x), call(merged, x))


def test_what_is_said_about_it() -> None:
    graph = rewritten(Attention(), "dynamo", MERGED)
    assert decided(graph) == {"k_proj": "applied: one product with v_proj, q_proj: 32 + 32 + 64 outputs"}
    merged = nodes_of(graph, "mixed_linear")[0]
    view = Annotations(merged)
    assert view.fqn == "k_proj+v_proj+q_proj"
    assert [member["fqn"] for member in view.members or []] == ["k_proj", "v_proj", "q_proj"]
    assert [member["scheme"] for member in view.members or []] == ["w8a8o16"] * 3


def test_each_linear_keeps_its_own_list_of_columns() -> None:
    graph = rewritten(Attention(), "dynamo", MERGED)
    refresh = nodes_of(graph, "refresh_outlier_weights")[0]
    assert {name: len(items) for name, items in listed_operands(refresh).items()} == {
        "cached_index": 3, "outlier_weight": 1, "weight_codes": 3, "weight_scale": 3, "original": 3,
    }  # fmt: skip
    call(graph, rows(6, columns=(3, 40)))
    cached = operand(refresh, "cached_index")
    assert all(graph.tensor(node)[:3].tolist() == [3, 40, -1] for node in cached)


def test_no_second_copy_of_the_weights_is_kept() -> None:
    torch.manual_seed(0)
    model, store = Attention(), WeightStore()
    graph = rewritten(model, "dynamo", MERGED, weights=store)
    weights = [model.k_proj.weight, model.v_proj.weight, model.q_proj.weight]
    (codes,) = {store.codes(weight)[0].weight_codes.untyped_storage().data_ptr() for weight in weights}
    merged = nodes_of(graph, "mixed_linear")[0]
    whole = graph.tensor(operand(merged, "weight_codes"))
    assert whole.data_ptr() == codes
    assert whole.untyped_storage().nbytes() == (64 + 32 + 32) * FEATURES
    names = [name for name, _ in graph.module.named_buffers()]
    assert not [name for name in names if name.endswith(("k_proj_weight_codes", "k_proj_weight_scale"))]


def test_a_recompilation_finds_the_joint_weight() -> None:
    model, store = Attention(), WeightStore()
    graphs = [rewritten(model, "dynamo", MERGED, weights=store, shape=shape) for shape in ((6,), (2, 9))]
    first, second = (
        [
            graph.tensor(operand(nodes_of(graph, "mixed_linear")[0], name)).data_ptr()
            for name in ("weight_codes", "weight_scale", "outlier_weight")
        ]
        for graph in graphs
    )
    assert first == second


def test_a_graph_that_keeps_them_apart_reads_rows_of_the_joint_weight() -> None:
    torch.manual_seed(0)
    model, store = Attention(), WeightStore()
    x = rows(6, columns=(3,))
    before = rewritten(model, "dynamo", APART, weights=store)
    expected = call(before, x)
    merged = rewritten(model, "dynamo", MERGED, weights=store)
    after = rewritten(model, "dynamo", APART, weights=store)
    assert all(torch.equal(expected, call(graph, x)) for graph in (before, merged, after))
    whole = merged.tensor(operand(nodes_of(merged, "mixed_linear")[0], "outlier_weight"))
    part = before.tensor(operand(nodes_of(before, "mixed_linear")[2], "outlier_weight"))
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    wide = rows(6, columns=(3, 40))
    expected = call(before, wide)
    assert all(torch.equal(expected, call(graph, wide)) for graph in (merged, after))


def test_a_graph_that_sees_one_sibling_alone() -> None:
    torch.manual_seed(0)
    model, store = Attention(), WeightStore()
    alone = capture(model.q_proj, rows(6), route="dynamo")
    run(alone, MERGED, weights=store)
    merged = rewritten(model, "dynamo", MERGED, weights=store)
    x, other = rows(6, columns=(3,)), rows(6, columns=(17,))
    for value in (x, other, x):
        assert sqnr(model.q_proj(value), call(alone, value)) > 30
        assert sqnr(model(value), call(merged, value)) > 30, "the other graph's columns got in the way"


@pytest.mark.parametrize("how", ["in place", "new storage"])
def test_a_written_parameter_is_packed_again_in_its_rows(how: str) -> None:
    torch.manual_seed(0)
    model, store = Attention().requires_grad_(False), WeightStore()
    graph = rewritten(model, "dynamo", MERGED, weights=store)
    x = rows(6, columns=(3,))
    call(graph, x)
    if how == "in place":
        model.v_proj.weight.mul_(-3.0)
    else:
        model.v_proj.weight.data = model.v_proj.weight * -3.0
    assert store.refresh(model.v_proj.weight)
    assert sqnr(model(x), call(graph, x)) > 30


def test_a_replaced_parameter_keeps_its_siblings_apart_and_says_so() -> None:
    torch.manual_seed(0)
    model, store = Attention().requires_grad_(False), WeightStore()
    kept = rewritten(model, "dynamo", MERGED, weights=store)
    x, weight = rows(6, columns=(3,)), model.q_proj.weight
    expected = call(kept, x)
    model.q_proj.weight = nn.Parameter(torch.randn(64, FEATURES), requires_grad=False)
    graph = rewritten(model, "dynamo", MERGED, weights=store)
    assert decided(graph)["k_proj"] == (
        "skipped: one of the weights lies beside another linear's already, for another graph"
    )
    assert sqnr(model(x), call(graph, x)) > 30
    model.q_proj.weight = weight
    assert torch.equal(call(kept, x), expected)


def test_siblings_that_are_all_replaced_merge_anew() -> None:
    model, store = Attention().requires_grad_(False), WeightStore()
    rewritten(model, "dynamo", MERGED, weights=store)
    for module in (model.q_proj, model.k_proj, model.v_proj):
        module.weight = nn.Parameter(torch.randn_like(module.weight), requires_grad=False)
    graph = rewritten(model, "dynamo", MERGED, weights=store)
    assert decided(graph)["k_proj"].startswith("applied")
    x = rows(6, columns=(3,))
    assert sqnr(model(x), call(graph, x)) > 30


def skipped(read: Callable[..., Tensor], **options: Any) -> str:
    """Why the readers of one value are not merged; the graph must still compute."""
    model = readers(read, options.pop("widths", (64, 64)), options.pop("biases", None))
    graph = rewritten(model, options.pop("route", "dynamo"), options.pop("text", MERGED), **options)
    x = rows(6, columns=(3,))
    assert sqnr(model(x), call(graph, x)) > 20
    (reason,) = [text for text in decided(graph).values() if text.startswith("skipped: ")]
    return reason.removeprefix("skipped: ")


@pytest.mark.parametrize("route", ROUTES)
def test_a_reader_that_needs_adjacent_memory(route: str) -> None:
    def read(x: Tensor, one: nn.Module, other: nn.Module) -> Tensor:
        return one(x).view(-1) * other(x).view(-1)

    assert skipped(read, route=route).startswith("a result must be adjacent in memory for view")


def test_a_later_reader_that_needs_adjacent_memory() -> None:
    def read(x: Tensor, one: nn.Module, other: nn.Module) -> Tensor:
        return one(x).unsqueeze(0).view(-1) * other(x).reshape(-1)

    assert skipped(read).startswith("a result must be adjacent in memory for view")


def test_views_that_keep_rows_apart_are_merged() -> None:
    """As attention does it: heads apart, then before the sequence."""

    def read(x: Tensor, one: nn.Module, other: nn.Module) -> Tensor:
        queries, keys = (module(x).view(2, 3, 4, -1).transpose(1, 2) for module in (one, other))
        return (queries @ keys.transpose(-1, -2)).flatten(1)

    model = readers(read)
    graph = rewritten(model, "dynamo", MERGED)
    assert mixq_calls(graph).count("mixed_linear") == 1
    x = rows(6, columns=(3,))
    assert sqnr(model(x), call(graph, x)) > 20


def test_a_result_that_leaves_the_graph() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(FEATURES, 64), nn.Linear(FEATURES, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.other(x)

    graph = rewritten(Pair(), "dynamo", MERGED)
    (decision,) = decisions(graph.history, "merge-siblings")
    assert decision.reason.startswith("a result leaves the graph")
    assert decision.details["blamed"] == [decision.node], "its own result is what leaves"


def test_a_result_that_is_written() -> None:
    assert "adjacent" in skipped(lambda x, one, other: one(x) * other(x).mul_(2.0))


def test_a_value_that_is_written_in_between() -> None:
    def read(x: Tensor, one: nn.Module, other: nn.Module) -> Tensor:
        y = x.clone()
        first = one(y) * 2.0
        y.mul_(1.5)
        return first * other(y)

    text = MERGED.replace("{force=true}", "{force=true default=w8a16}")
    assert skipped(read, text=text) == "the value is changed in place between the products: mul_"


def test_a_weight_that_reads_the_value_twice() -> None:
    assert skipped(lambda x, one, other: one(x) * other(x) * one(x)) == (
        "one of the linears reads the value twice: mixed_linear_default_2"
    )


def test_a_weight_that_reads_another_value_too() -> None:
    assert skipped(lambda x, one, other: one(x) * other(x) * one(x * 0.5)) == (
        "one of the weights is also read without its siblings: mixed_linear_default_2"
    )


def test_a_layer_shared_by_depth_is_merged_in_every_round() -> None:
    class Round(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.layer(x)
            return x

    torch.manual_seed(0)
    model = Round()
    graph = rewritten(model, "dynamo", MERGED)
    assert mixq_calls(graph).count("mixed_linear") == 6
    assert len([d for d in decisions(graph.history, "merge-siblings") if d.verdict == "applied"]) == 1
    wholes = {operand(node, "weight_codes") for node in nodes_of(graph, "mixed_linear")}
    assert len(wholes) == 2, "a round has a weight of its own"
    x = rows(6)
    assert sqnr(model(x), call(graph, x)) > 30


@pytest.mark.parametrize("layers", ["linears.0=w4a8o16", "linears.0=w8a8"], ids=["other bits", "no outliers"])
def test_another_scheme_is_left_alone(layers: str) -> None:
    text = MERGED.replace("{force=true}", f"{{force=true layers={layers}}}")
    model = readers(joined, (64, 32, 32))
    graph = rewritten(model, "dynamo", text)
    found = decided(graph)
    assert found["linears.0"].startswith(
        "skipped: it has siblings with another scheme, policy or columns: mixed"
    )
    assert found["linears.1"].startswith("applied: one product with linears.2")
    x = rows(6, columns=(3,))
    assert sqnr(model(x), call(graph, x)) > 15


def test_two_families_may_share_one_quantization() -> None:
    """Of 8 and of 4 bits: two joint weights, one refresh."""
    text = MERGED.replace("{force=true}", "{force=true layers=linears.1=w4a8o16,linears.3=w4a8o16}")
    model = readers(joined, (64, 32, 16, 48))
    graph = rewritten(model, "dynamo", text, weights=WeightStore())
    assert [mixq_calls(graph).count(name) for name in ("quantize_online", "mixed_linear")] == [1, 2]
    (refresh,) = nodes_of(graph, "refresh_outlier_weights")
    assert {name: len(items) for name, items in listed_operands(refresh).items()} == {
        "cached_index": 4, "outlier_weight": 2, "weight_codes": 4, "weight_scale": 4, "original": 4,
    }  # fmt: skip
    apart = rewritten(model, "dynamo", text.replace("when=always", "when=never"), weights=WeightStore())
    x = rows(6, columns=(3, 40))
    assert torch.equal(call(apart, x), call(graph, x))


def test_other_calibrated_columns_are_left_alone() -> None:
    stats = statistics({"linears.0": {3: 9.0}, "linears.1": {4: 9.0}})
    text = MERGED.replace(CHOSEN, f"{CHOSEN},annotate-outliers")
    graph = rewritten(readers(gated), "dynamo", text, stats=stats)
    first, second = decisions(graph.history, "merge-siblings")
    assert first.reason == f"it has siblings with another scheme, policy or columns: {second.node}"
    assert second.details == {"blamed": [first.node]}


def test_automatic_merging_asks_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    text = MERGED.replace("when=always", "kernel=ref")
    graph = rewritten(Attention(), "dynamo", text)
    assert decided(graph)["k_proj"] == "skipped: one product is not known to beat several with ref"
    asked = []

    def merges(query: providers.KernelQuery) -> str | bool:
        asked.append((query.out_features, query.in_features))
        return "too wide" if len(asked) == 1 else True

    entry = providers.named("mixed_linear", "ref")
    changed = providers.Provider(**{**vars(entry), "merges": merges})
    monkeypatch.setitem(providers._PROVIDERS["mixed_linear"], "ref", changed)
    graph = rewritten(Attention(), "dynamo", text)
    assert decided(graph)["k_proj"] == "skipped: no gain with ref: too wide"
    graph = rewritten(Attention(), "dynamo", text)
    assert decided(graph)["k_proj"].startswith("applied")
    assert asked == [(128, FEATURES)] * 2


def test_on_nvidia_gpus_one_product_is_taken() -> None:
    providers.load_providers()
    query = providers.KernelQuery(
        "mixed_linear", torch.device("cuda"), torch.bfloat16, INT8, INT8, 4096, 12288
    )
    for operator in ("mixed_linear", "weight_only_linear"):
        entry = providers.named(operator, "tl")
        assert entry.merges is not None
        assert entry.merges(query) is True


def test_it_can_be_turned_off() -> None:
    graph = rewritten(Attention(), "dynamo", APART)
    assert decided(graph) == {"k_proj": "skipped: merging is turned off"}


def test_merging_stops_where_fuel_ends_and_the_graph_still_computes() -> None:
    model = nn.Sequential(Attention(), Attention())
    x = rows(6, columns=(3,))
    graph = captured(model, "dynamo")
    before = sum(record.count("applied") for record in run(graph, FUSED).records)
    merged = []
    for rewrites in range(before, before + 3):
        graph = captured(model, "dynamo")
        run(graph, MERGED, fuel=Fuel(rewrites))
        merged.append(sum(bool(Annotations(node).members) for node in nodes_of(graph, "mixed_linear")))
        assert sqnr(model(x), call(graph, x)) > 25, f"{rewrites} rewrites"
    assert merged == [0, 1, 2]


def swapped(model: nn.Module, route: str = "dynamo", when: str = "always") -> CapturedGraph:
    graph = capture(model, rows(6), route=route)
    text = SWAPPED.replace("always", when)
    graph.history = run(graph, text, weights=STORE)  # type: ignore[attr-defined]
    return graph


@pytest.mark.parametrize("biases", [(True,) * 3, (False,) * 3, (True, False, True)])
@pytest.mark.parametrize("route", ROUTES)
def test_modules_that_were_swapped(route: str, biases: tuple[bool, ...]) -> None:
    model, other = (mixq.quantize(readers(joined, (64, 16, 16), biases)) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph, apart = swapped(model, route), swapped(other, route, "never")
    (merged,) = nodes_of(graph, "mixed_linear")
    if all(biases):
        assert operand(merged, "bias").op == "get_attr", "biases are put together in every call"
    after = model.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, equal_nan=True)
    x = rows(6, columns=(3,))
    assert torch.equal(call(graph, x), call(apart, x))
    with torch.no_grad():
        assert sqnr(call(graph, x), model(x)) > 100, "eager modules compute something else"
    assert [module.outlier_state().columns() for module in model.linears] == [[3]] * 3


def test_loading_into_swapped_modules_changes_the_merged_graph() -> None:
    model, other = (mixq.quantize(readers(joined, (64, 16), (True, True))) for _ in range(2))
    graph = swapped(model)
    x = rows(6, columns=(3,))
    call(graph, x)
    for module in other.linears:
        module.weight_codes.neg_()
        module.bias.data.mul_(2.0)
    model.load_state_dict(other.state_dict())
    assert torch.equal(call(graph, x), call(swapped(other, when="never"), x))
