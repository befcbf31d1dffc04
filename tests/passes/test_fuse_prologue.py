"""`fuse-prologue`: which producers are found in real captures, which are not, and that no bit changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captures import ROUTES, capture
from linear_models import FEATURES, captured, rows
from rewriting import FUSED, call, calls, decisions, mixq_calls, nodes_of, run, sqnr
from tiny_llama import ids, tiny_llama, transformers
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops import providers
from mixq_compile.pipeline import Fuel
from mixq_compile.runtime.weight_store import STORE, WeightStore

END = "select-kernels{kernel=ref},prune-dead-weights,verify"
TOGETHER = f"{FUSED},fuse-prologue{{when=always}},{END}"
APART = f"{FUSED},fuse-prologue{{when=never}},{END}"
FUSIONS = ("norm_quantize", "activation_quantize")


class Read(nn.Module):
    """A linear that reads what some modules make."""

    def __init__(self, make: Callable[..., Tensor], *modules: nn.Module, reads_too: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.linear = nn.Linear(FEATURES, 48)
        self.make, self.reads_too = make, reads_too

    def forward(self, x: Tensor) -> Tensor:
        value = self.make(x, *self.parts)
        result = self.linear(value)
        return result * value[..., :48] if self.reads_too else result


def llama_norm(**options: Any) -> nn.Module:
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(FEATURES, **options)
    nn.init.uniform_(norm.weight, 0.5, 1.2)
    norm.weight.data[7] = 30.0
    return norm


def t5_norm() -> nn.Module:
    return transformers.models.t5.modeling_t5.T5LayerNorm(FEATURES)


def applied(x: Tensor, module: nn.Module) -> Tensor:
    return module(x)


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "llama": ("rms", lambda: Read(applied, llama_norm())),
    "t5": ("rms", lambda: Read(applied, t5_norm())),
    "layer norm": ("layer", lambda: Read(applied, nn.LayerNorm(FEATURES))),
    "layer norm without bias": ("layer", lambda: Read(applied, nn.LayerNorm(FEATURES, bias=False))),
    "gate": ("silu", lambda: Read(lambda x: nn.functional.silu(x) * (x + 1))),
    "gate behind": ("silu", lambda: Read(lambda x: (x + 1) * nn.functional.silu(x))),
    "gelu gate": ("gelu_tanh", lambda: Read(lambda x: nn.functional.gelu(x, approximate="tanh") * (x + 1))),
    "gelu": ("gelu", lambda: Read(applied, nn.GELU())),
    "read twice": ("rms", lambda: Read(applied, llama_norm(), reads_too=True)),
}


def rewritten(model: nn.Module, route: str, text: str, x: Tensor, **options: Any) -> CapturedGraph:
    graph = captured(model, route, x, dynamic=options.pop("dynamic", False))
    graph.history = run(graph, text, weights=WeightStore(), **options)  # type: ignore[attr-defined]
    return graph


def fusions(graph: CapturedGraph) -> int:
    return sum(mixq_calls(graph).count(name) for name in FUSIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MODELS)
def test_a_producer_is_fused_and_no_bit_changes(
    name: str, route: str, dynamic: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    what, make = MODELS[name]
    model = make().eval().to(dtype)
    x = rows(6, columns=(3, 40)).to(dtype)
    apart, together = (rewritten(model, route, text, x, dynamic=dynamic) for text in (APART, TOGETHER))
    (decision,) = decisions(together.history, "fuse-prologue")
    if dynamic and route == "dynamo" and what in ("rms", "layer"):
        assert decision.reason.startswith("the norm's epsilon is an input of the graph")
        return
    assert decision.reason == f"{what} and the quantization of its result become one"
    assert decision.fqn == "linear"
    assert (fusions(apart), fusions(together)) == (0, 1)
    assert "quantize_online" not in mixq_calls(together)
    for turn in range(2):
        assert torch.equal(call(apart, x), call(together, x)), f"call {turn}"
    counts = [state_columns(graph) for graph in (apart, together)]
    assert counts[0] == counts[1]


def state_columns(graph: CapturedGraph) -> list[int]:
    """The columns of the outlier state that belongs to the graph's refresh."""
    (refresh,) = nodes_of(graph, "refresh_outlier_weights")
    index: Any = graph.tensor(refresh.args[1])
    return [int(column) for column in index]


def test_nothing_of_the_producer_stays_behind() -> None:
    x = rows(6)
    graph = rewritten(Read(applied, llama_norm()), "dynamo", TOGETHER, x)
    assert [name for name in calls(graph) if not name.startswith("mixq.")] == []


@pytest.mark.parametrize("route", ROUTES)
def test_a_llama(route: str) -> None:
    model = tiny_llama()
    graphs = [capture(model, input_ids=ids(), use_cache=False, route=route) for _ in range(2)]
    for graph, text in zip(graphs, (APART, TOGETHER), strict=True):
        graph.history = run(graph, text, weights=WeightStore())  # type: ignore[attr-defined]
    assert mixq_calls(graphs[1]).count("norm_quantize") == 4
    assert mixq_calls(graphs[1]).count("activation_quantize") == 2
    assert mixq_calls(graphs[1]).count("quantize_online") == 2, "the attention's results"
    found = [decision.reason for decision in decisions(graphs[1].history, "fuse-prologue")]
    assert found.count("what makes its value is no norm or activation function that has a kernel") == 2
    if route == "dynamo":
        assert torch.equal(*(call(graph, ids()) for graph in graphs))


def test_with_merged_siblings() -> None:
    """The gate and its factor are then parts of one result."""
    model = tiny_llama()
    text = TOGETHER.replace(",fuse-prologue", ",merge-siblings{when=always},fuse-prologue")
    graphs = [capture(model, input_ids=ids(), use_cache=False, route="dynamo") for _ in range(2)]
    for graph, chosen in zip(graphs, (APART, text), strict=True):
        run(graph, chosen, weights=WeightStore())
    assert [mixq_calls(graphs[1]).count(name) for name in (*FUSIONS, "mixed_linear")] == [4, 2, 8]
    assert torch.equal(*(call(graph, ids()) for graph in graphs))


def test_swapped_modules() -> None:
    torch.manual_seed(0)
    model = Read(applied, llama_norm()).eval()
    expected = model(rows(6))
    mixq.quantize(model)
    graph = captured(model, "dynamo")
    text = f"strip-guards,expand-linear,share-quantize,fuse-epilogue,fuse-prologue{{when=always}},{END}"
    run(graph, text, weights=STORE)
    assert fusions(graph) == 1
    assert sqnr(expected, call(graph, rows(6))) > 30
    assert model.linear.outlier_state().columns() == [7]


def skipped(make: Callable[..., Tensor], *modules: nn.Module, text: str = TOGETHER) -> str:
    torch.manual_seed(0)
    model = Read(make, *modules).eval()
    graph = rewritten(model, "dynamo", text, rows(6))
    assert sqnr(model(rows(6)), call(graph, rows(6))) > 25
    (decision,) = decisions(graph.history, "fuse-prologue")
    assert decision.verdict == "skipped"
    return decision.reason


UNKNOWN: dict[str, Callable[..., Tensor]] = {
    "another function": lambda x: torch.sigmoid(x),
    "another mean": lambda x: x * torch.rsqrt(x.float().pow(2).mean(0, keepdim=True) + 1e-6).to(x.dtype),
    "another power": lambda x: torch.ones(FEATURES) * (
        x.float() * torch.rsqrt(x.float().pow(4).mean(-1, keepdim=True) + 1e-6)
    ).to(x.dtype),
    "a factor of another shape": lambda x: nn.functional.silu(x) * x[..., :1],
    "an input": lambda x: x,
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_stays(case: str) -> None:
    assert skipped(UNKNOWN[case]).startswith("what makes its value is no norm or activation")


def test_a_weight_that_is_computed_stays() -> None:
    """As in Gemma, whose norm multiplies by 1 + weight in fp32."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(FEATURES))

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (wide * (1.0 + self.weight.float())).type_as(x)

    assert skipped(applied, Shifted()).startswith("what makes its value is no norm")


def test_what_is_written_meanwhile_stays() -> None:
    def source(x: Tensor) -> Tensor:
        y = x.clone()
        activated = nn.functional.silu(y)
        y.mul_(2.0)
        return activated * y

    assert skipped(source) == "what the value is made from is changed in place meanwhile"

    def value(x: Tensor) -> Tensor:
        y = nn.functional.gelu(x)
        y.view(-1).mul_(2.0)
        return y

    assert skipped(value) == "the value is changed in place before it is quantized"


def test_automatic_fusing_asks_for_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = TOGETHER.replace("when=always", "when=auto")
    norm = llama_norm()
    assert skipped(applied, norm, text=automatic) == "no kernel does both on cpu"
    providers.load_providers()
    fast = providers.Provider("norm_quantize", "fast", lambda: None, lambda query: True, 9)
    table = providers._PROVIDERS["norm_quantize"]
    monkeypatch.setitem(table, "fast", fast)
    text = automatic
    assert skipped(applied, norm, text=text) == "it was not measured whether one kernel beats two with fast"
    slow = providers.Provider(**{**vars(fast), "speedup": lambda query, rows: 0.9})
    monkeypatch.setitem(table, "fast", slow)
    assert skipped(applied, norm, text=text) == "not faster with fast: 0.90x at 6 rows"
    good = providers.Provider(**{**vars(fast), "speedup": lambda query, rows: 1.1})
    monkeypatch.setitem(table, "fast", good)
    graph = rewritten(Read(applied, norm), "dynamo", automatic, rows(6))
    assert fusions(graph) == 1


def test_it_can_be_turned_off() -> None:
    assert skipped(applied, llama_norm(), text=APART) == "turned off"


def test_fusing_stops_where_fuel_ends() -> None:
    model = nn.Sequential(Read(applied, llama_norm()), nn.Linear(48, FEATURES), Read(applied, nn.GELU()))
    before = sum(r.count("applied") for r in run(captured(model, "dynamo"), FUSED).records)
    found = []
    for rewrites in range(before, before + 3):
        graph = captured(model, "dynamo")
        run(graph, TOGETHER, weights=WeightStore(), fuel=Fuel(rewrites))
        found.append(fusions(graph))
        assert sqnr(model(rows(6)), call(graph, rows(6))) > 25
    assert found == [0, 1, 2]


def test_a_report_knows_a_fused_quantization() -> None:
    torch.manual_seed(0)
    model = Read(applied, llama_norm()).eval().requires_grad_(False)
    options = {"force": True, "kernel": "ref", "lowering": "aot_eager", "fuse_prologue": "always"}
    fast = torch.compile(model, backend="mixq", fullgraph=True, options=options)
    x = rows(6)
    assert sqnr(model(x), fast(x)) > 30
    (linear,) = mixq.report(fast).quantized
    assert linear.outlier_columns == (7,)
    assert linear.outlier_source == "original"
    torch._dynamo.reset()
