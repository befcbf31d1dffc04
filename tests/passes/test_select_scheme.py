"""`select-scheme`: which linears are quantized, and the reason of each that is not."""

from __future__ import annotations

import pytest
import torch
from captures import ROUTES
from linear_models import ATTENTION, FEATURES, Attention, captured, network, rows
from rewriting import NAMED, decisions, reasons, run
from torch import Tensor, nn

from mixq_compile.errors import OptionError, ReleasedWeightError
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.name_patterns import name_matches
from mixq_compile.ops import providers
from mixq_compile.ops.providers import KernelQuery, Provider
from mixq_compile.passes.select_scheme import SelectScheme
from mixq_compile.pipeline import PassError
from mixq_compile.runtime.weight_store import WeightStore
from mixq_compile.scheme import QuantScheme


def select(
    graph: CapturedGraph, options: str = "force=true", weights: WeightStore | None = None
) -> dict[str, str]:
    return reasons(run(graph, f"{NAMED},select-scheme{{{options}}}", weights=weights), "select-scheme")


@pytest.mark.parametrize("route", ROUTES)
def test_every_linear_has_a_decision(route: str) -> None:
    graph = captured(network(), route)
    assert select(graph) == {
        **dict.fromkeys(ATTENTION, "applied: scheme w8a8o16"),
        "lm_head": "skipped: ignored: its name matches 'lm_head'",
    }


def test_the_decision_is_annotated() -> None:
    graph = captured(network(), "dynamo")
    select(graph, "force=true threshold=4.0 capacity=32 miss=lazy")
    views = {Annotations(node).fqn: Annotations(node) for node in graph.walk(torch.ops.aten.linear.default)}
    scheme = QuantScheme.from_json(views["attn.q_proj"].parameters)
    assert views["attn.q_proj"].scheme == scheme.name == "w8a8o16"
    assert (scheme.outliers.threshold, scheme.outliers.capacity, scheme.outliers.miss) == (4.0, 32, "lazy")
    assert views["lm_head"].scheme is None
    assert views["lm_head"].skip == "ignored: its name matches 'lm_head'"


def test_names_parts_of_names_and_globs_are_ignored() -> None:
    graph = captured(network(), "dynamo")
    found = select(graph, "force=true ignore=attn.q_proj,k_proj,*v_*")
    assert found["attn.q_proj"] == "skipped: ignored: its name matches 'attn.q_proj'"
    assert found["attn.k_proj"] == "skipped: ignored: its name matches 'k_proj'"
    assert found["attn.v_proj"] == "skipped: ignored: its name matches '*v_*'"
    assert found["lm_head"] == "skipped: the output head stays in 16 or 32 bit", "a head is never quantized"


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("a.b.c", "a.b.c", True),
        ("a.b.c", "b", True),
        ("a.bb.c", "b", False),
        ("a.b.c", "a.b", True),
        ("a.b.c", "b.c", True),
        ("a.b.c", "a.c", False),
        ("a.bb.c", "a.b", False),
        ("model.layers.10.mlp", "layers.1", False),
        ("model.layers.0.self_attn.q_proj", "layers.*.q_proj", True),
        ("model.layers.0.self_attn.q_proj", "self_attn.?_proj", True),
        ("model.layers.0.mlp.down_proj", "re:.*down_proj", True),
        ("model.layers.0.mlp.down_proj", "re:down_proj", False),
        ("a.b.c", "", False),
        ("a.b.c", "a.*", True),
        ("a.b.c", "*.[cd]", True),
    ],
)
def test_what_a_pattern_matches(name: str, pattern: str, matches: bool) -> None:
    assert name_matches(name, pattern) == matches


def test_layers_have_schemes_of_their_own_and_the_first_pattern_decides() -> None:
    graph = captured(network(), "dynamo")
    found = select(graph, "force=true layers=attn.q_proj=w8a16,attn.*=w4a8o16")
    assert found["attn.q_proj"] == "applied: scheme w8a16"
    assert found["attn.k_proj"] == "applied: scheme w4a8o16"


def test_a_scheme_of_4_bit_activations_keeps_down_projections_at_8() -> None:
    step = SelectScheme(default="w4a4o16", threshold=3.0)
    assert step.scheme_for("layers.0.mlp.up_proj", "up").name == "w4a4o16"
    down = step.scheme_for("layers.0.mlp.down_proj", "down")
    assert down.name == "w8a8o16"
    assert down.outliers is not None
    assert down.outliers.threshold == 3.0


def test_layers_without_a_scheme_are_refused() -> None:
    with pytest.raises(OptionError, match=r"layers takes pattern=scheme, for example .*, not 'attn'"):
        SelectScheme(layers=("attn",)).scheme_for("attn.q_proj", "q")


def test_an_unknown_scheme_lists_the_valid_ones() -> None:
    with pytest.raises(PassError, match="Did you mean 'w8a8o16'"):
        select(captured(network(), "dynamo"), "default=w8a8o61")


class Odd(nn.Module):
    """Linears that cannot be quantized, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(FEATURES, 8)
        self.wide = nn.Linear(FEATURES, 32).double()
        self.scaled = nn.Linear(FEATURES, 32)
        self.gate = nn.Linear(FEATURES, 32)
        self.table = nn.Embedding(32, FEATURES)
        self.reader = nn.Linear(FEATURES, 32, bias=False)
        self.reader.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        scaled = nn.functional.linear(x, self.scaled.weight * 2)
        embedded = self.table(torch.zeros(6, dtype=torch.long)) + x
        found = self.reader(embedded) + self.wide(x.double()).float() + scaled + self.gate(x)
        return self.narrow(x).sum() + found


@pytest.mark.parametrize("route", ROUTES)
def test_reasons_of_linears_that_cannot_be_quantized(route: str) -> None:
    assert select(captured(Odd(), route)) == {
        "narrow": "skipped: too small: (8, 64), and an integer product needs 16 of each",
        "wide": "skipped: its weight is torch.float64, not a floating-point type that has kernels",
        "scaled": "skipped: its weight is computed, not a parameter",
        "gate": "skipped: a router, or a product that no linear module owns",
        "reader": "skipped: its weight is tied to an embedding",
    }


@pytest.mark.parametrize("route", ROUTES)
def test_a_weight_that_something_else_makes_or_reads_names_it(route: str) -> None:
    graph = captured(Odd(), route)
    history = run(graph, f"{NAMED},select-scheme{{force=true}}")
    blamed = {each.fqn: each.details.get("blamed") for each in decisions(history, "select-scheme")}
    names = {node.name: node for node in graph.graph.nodes}
    assert "mul" in str(names[blamed["scaled"][0]].target)
    assert "embedding" in str(names[blamed["reader"][0]].target)
    assert blamed["narrow"] is None, "nothing else is to blame for its size"


class TestSpeed:
    """Decisions by what a provider says about its speed."""

    @pytest.fixture
    def speedups(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, float | None]:
        """Speed-up by rows of the only provider."""
        providers.load_providers()
        table: dict[int, float | None] = {}

        def speedup(query: KernelQuery, rows: int) -> float | None:
            return table.get(rows)

        fast = Provider("mixed_linear", "fast", lambda: None, lambda query: True, 9, speedup)
        monkeypatch.setitem(providers._PROVIDERS, "mixed_linear", {"fast": fast})
        providers.choose.cache_clear()
        return table

    @pytest.fixture(autouse=True)
    def forget(self):  # type: ignore[no-untyped-def]
        yield
        providers.choose.cache_clear()

    def test_a_linear_that_is_slower_at_its_rows_is_left_alone(
        self, speedups: dict[int, float | None]
    ) -> None:
        speedups.update({6: 0.7, 256: 2.0})
        found = select(captured(Attention(), "dynamo"), "ignore=")
        assert found["q_proj"] == "skipped: not faster with fast: 0.70x at 6 rows"

    def test_one_that_is_faster_is_quantized(self, speedups: dict[int, float | None]) -> None:
        speedups.update({6: 1.4})
        assert select(captured(Attention(), "dynamo"), "ignore=")["q_proj"].startswith("applied")

    def test_nothing_known_is_no_reason(self, speedups: dict[int, float | None]) -> None:
        assert select(captured(Attention(), "dynamo"), "ignore=")["q_proj"].startswith("applied")

    @pytest.mark.parametrize("route", ROUTES)
    def test_symbolic_rows_may_win_at_a_large_batch(
        self, route: str, speedups: dict[int, float | None]
    ) -> None:
        speedups.update({6: 0.7, 256: 1.2})
        found = select(captured(Attention(), route, dynamic=True), "ignore=")
        assert found["q_proj"].startswith("applied")
        speedups[256] = 0.9
        found = select(captured(Attention(), route, dynamic=True), "ignore=")
        assert found["q_proj"] == "skipped: not faster with fast: 0.70x at 6 rows, 0.90x at 256 rows"

    def test_force_asks_nobody(self, speedups: dict[int, float | None]) -> None:
        speedups.update({6: 0.1})
        assert select(captured(Attention(), "dynamo"))["q_proj"].startswith("applied")

    def test_without_a_fast_kernel_the_refusals_are_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        providers.load_providers()
        slow = Provider("mixed_linear", "ref", lambda: None, lambda query: True, 0)
        refused = Provider("mixed_linear", "fast", lambda: None, lambda query: "needs a GPU", 5)
        monkeypatch.setitem(providers._PROVIDERS, "mixed_linear", {"ref": slow, "fast": refused})
        providers.choose.cache_clear()
        found = select(captured(Attention(), "dynamo"), "ignore=")
        assert found["q_proj"] == "skipped: no fast kernel: fast: needs a GPU"

    def test_a_kernel_that_cannot_run_here_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        providers.load_providers()
        refused = Provider("mixed_linear", "fast", lambda: None, lambda query: "needs a GPU", 5)
        monkeypatch.setitem(providers._PROVIDERS["mixed_linear"], "fast", refused)
        with pytest.raises(
            PassError, match="kernel 'fast' cannot run mixq::mixed_linear on cpu: needs a GPU"
        ):
            select(captured(Attention(), "dynamo"), "kernel=fast")

    def test_a_freed_weight_stays_quantized_however_slow(self, speedups: dict[int, float | None]) -> None:
        speedups.update({6: 0.1})
        model, store = Attention(), WeightStore()
        graph = captured(model, "dynamo")
        store.release(model.q_proj.weight)
        found = select(graph, "ignore=", weights=store)
        assert found["q_proj"].startswith("applied")
        assert found["k_proj"].startswith("skipped")

    def test_siblings_that_are_always_merged_are_judged_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the provider says of merging: what runs is the one product."""
        providers.load_providers()
        fast = Provider(
            "mixed_linear", "fast", lambda: None, lambda query: True, 9,
            speedup=lambda query, rows: 1.2 if (query.out_features or 0) >= 64 else 0.8,
            merges=lambda query: "it is slower",
        )  # fmt: skip
        monkeypatch.setitem(providers._PROVIDERS, "mixed_linear", {"fast": fast})
        found = select(captured(Attention(), "dynamo"), "ignore=")
        assert found["k_proj"] == "skipped: not faster with fast: 0.80x at 6 rows"
        found = select(captured(Attention(), "dynamo"), "ignore= merge_siblings=always")
        assert found["k_proj"] == "applied: scheme w8a8o16"

    def test_siblings_are_judged_as_the_one_product_they_become(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Alone, k and v are too narrow to gain."""
        providers.load_providers()
        fast = Provider(
            "mixed_linear", "fast", lambda: None, lambda query: True, 9,
            speedup=lambda query, rows: 1.2 if (query.out_features or 0) >= 64 else 0.8,
            merges=lambda query: True,
        )  # fmt: skip
        monkeypatch.setitem(providers._PROVIDERS, "mixed_linear", {"fast": fast})
        found = select(captured(Attention(), "dynamo"), "ignore=")
        assert all(text.startswith("applied") for text in found.values())
        found = select(captured(Attention(), "dynamo"), "ignore= merge_siblings=never")
        assert found["k_proj"] == "skipped: not faster with fast: 0.80x at 6 rows"
        found = select(captured(Attention(), "dynamo"), "ignore=q_proj,v_proj")
        assert found["k_proj"].startswith("skipped"), "it was judged with siblings that stay as they are"
        found = select(captured(Attention(), "dynamo"), "ignore= layers=k_proj=w8a8")
        assert found["k_proj"].startswith("skipped"), "it was judged with siblings of another scheme"


def test_a_freed_weight_that_would_be_left_alone_is_an_error() -> None:
    model, store = Attention(), WeightStore()
    graph = captured(model, "dynamo")
    store.release(model.q_proj.weight)
    with pytest.raises(PassError, match=r"would be left alone now .*'release_weights': True") as caught:
        select(graph, "force=true ignore=q_proj", weights=store)
    assert isinstance(caught.value.__cause__, ReleasedWeightError)


def test_nothing_is_guarded_on_a_symbolic_number_of_rows() -> None:
    graph = captured(network(), "dynamo", rows(6), dynamic=True)
    shapes = graph.fake_mode.shape_env
    guards = len(shapes.guards)
    select(graph)
    assert len(shapes.guards) == guards


def test_decisions_say_where() -> None:
    history = run(captured(network(), "dynamo"), f"{NAMED},select-scheme{{force=true}}")
    assert all("linear_models.py" in decision.where for decision in decisions(history, "select-scheme"))
