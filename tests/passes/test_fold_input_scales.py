"""`fold-input-scales`: which divisions move into the parameters before, and what forbids the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captures import ROUTES, capture
from linear_models import rows, statistics
from rewriting import CHOSEN, NAMED, decisions, run
from small_transformers import difference, rewritten, tokens, transformer
from torch import Tensor, nn

from mixq_compile.ir.annotations import Annotations
from mixq_compile.passes._scale_sources import reshaped

EXACT = 1e-5
BOTH = f"{NAMED},equalize-inputs,fold-input-scales"
aten = torch.ops.aten

TABLE = {
    "llama": {
        "q_proj": "input_layernorm.weight",
        "o_proj": "v_proj.weight.equalized",
        "gate_proj": "post_attention_layernorm.weight",
        "down_proj": "up_proj.weight.equalized",
    },
    "gemma": {
        "q_proj": "input_layernorm.weight",
        "o_proj": "v_proj.weight.equalized",
        "gate_proj": "post_attention_layernorm.weight",
        "down_proj": "up_proj.weight.equalized",
    },
    "opt": {
        "q_proj": "self_attn_layer_norm.weight self_attn_layer_norm.bias",
        "out_proj": "v_proj.weight.equalized v_proj.bias",
        "fc1": "final_layer_norm.weight final_layer_norm.bias",
        "fc2": "fc1.weight.equalized fc1.bias",
    },
    "gpt2": {
        "attn.c_attn": "ln_1.weight ln_1.bias",
        "attn.c_proj": "c_attn.weight.equalized c_attn.bias",
        "mlp.c_fc": "ln_2.weight ln_2.bias",
        "mlp.c_proj": "",
    },
    "bert": {
        "query": "",
        "attention.output.dense": "value.weight.equalized value.bias",
        "intermediate.dense": "",
        "layer.0.output.dense": "",
        "pooler.dense": "",
    },
}
"""For each model the first linear that reads each value, and the parameters that take its factors."""

FORBIDDEN = {
    ("bert", "query"): "is also read by add_4 (m.encoder.layer.0.attention.output)",
    ("bert", "intermediate.dense"): "is also read by add_5 (m.encoder.layer.0.output)",
    ("bert", "layer.0.output.dense"): "gelu (gelu.default) does not pass on a factor for each channel",
    ("gpt2", "mlp.c_proj"): "is also read by pow_1 (m.transformer.h.0.mlp.act)",
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", TABLE)
def test_what_is_folded_into_what(kind: str, route: str) -> None:
    model = transformer(kind)
    graph, history = rewritten(model, BOTH, route)
    found = {decision.fqn: decision for decision in decisions(history, "fold-input-scales")}
    assert len(found) == len(TABLE[kind]), f"values that are divided: {list(found)}"
    for fqn, decision in found.items():
        (name,) = (name for name in TABLE[kind] if fqn.endswith(name))
        expected = TABLE[kind][name].split()
        into = decision.details.get("into", [])
        assert len(into) == len(expected), f"{name}: {decision.reason}"
        assert all(got.endswith(f".{want}") for got, want in zip(into, expected, strict=True)), (
            decision.reason
        )
    divisions = [node for node in graph.walk(aten.mul.Tensor) if Annotations(node).equalized]
    assert len(divisions) == sum(not into for into in TABLE[kind].values()), "a folded division still runs"
    assert difference(graph, model) < EXACT


@pytest.mark.parametrize(("kind", "name"), FORBIDDEN)
def test_a_refusal_names_who_forbids_it(kind: str, name: str) -> None:
    _, history = rewritten(transformer(kind), BOTH)
    (decision,) = (each for each in decisions(history, "fold-input-scales") if each.fqn.endswith(name))
    assert decision.verdict == "skipped"
    assert FORBIDDEN[kind, name] in decision.reason
    assert decision.details["blamed"]


def test_under_a_symbolic_batch_the_same_is_folded() -> None:
    model = transformer("llama")
    graph, history = rewritten(model, BOTH, dynamic=True)
    assert all(each.verdict == "applied" for each in decisions(history, "fold-input-scales"))
    assert difference(graph, model, tokens(5)) < EXACT


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_heads_shared_among_queries_are_refused(attention: str) -> None:
    """Channels of one value head meet several channels of the output linear, with other factors."""
    model = transformer("llama", num_key_value_heads=2, attn_implementation=attention)
    graph, history = rewritten(model, BOTH)
    (decision,) = (each for each in decisions(history, "fold-input-scales") if each.fqn.endswith("o_proj"))
    assert decision.verdict == "skipped"
    assert "repeats channels whose factors differ" in decision.reason
    assert difference(graph, model) < EXACT


def test_attention_written_out_is_folded_through() -> None:
    model = transformer("llama", attn_implementation="eager")
    graph, history = rewritten(model, BOTH)
    assert all(each.verdict == "applied" for each in decisions(history, "fold-input-scales"))
    assert difference(graph, model) < EXACT


def test_a_cache_that_reads_the_values_forbids_it() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v_proj, self.o_proj = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            values = self.v_proj(x)
            return self.o_proj(values), values

    verdict, reason, _ = folded(Cached(), "o_proj")
    assert verdict == "skipped"
    assert "is also read by output" in reason


class Before(nn.Module):
    """A linear, something, and a linear whose input is equalized."""

    def __init__(self, between: Callable[[Tensor], Tensor], features: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(features, 64)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def folded(model: nn.Module, name: str, route: str = "export") -> tuple[str, str, float]:
    """Verdict and reason for the value that a linear reads, and the relative error of the graph."""
    torch.manual_seed(1)
    model = model.eval().requires_grad_(False)
    x = rows(2, 6)
    graph = capture(model, x, route=route)
    linears = {fqn: module for fqn, module in model.named_modules() if isinstance(module, nn.Linear)}
    maxima = {fqn: {3: 40.0, 11: 0.1} for fqn in linears}
    history = run(graph, f"{CHOSEN},equalize-inputs,fold-input-scales", stats=statistics(maxima))
    (decision,) = (each for each in decisions(history, "fold-input-scales") if each.fqn == name)
    placeholders = [graph.tensor(node) for node in graph.graph.nodes if node.op == "placeholder"]
    got = graph.module(*(x if tensor is None else tensor for tensor in placeholders))
    got, expected = (each[0] if isinstance(each, tuple) else each for each in (got, model(x)))
    return decision.verdict, decision.reason, float((got - expected).norm() / expected.norm())


PASSED = {
    "nothing": lambda x: x,
    "relu": torch.relu,
    "relu method": lambda x: x.relu(),
    "a number": lambda x: 0.5 * x,
    "float": lambda x: x.float(),
    "contiguous": lambda x: x.contiguous(),
    "heads and back": lambda x: x.view(2, 6, 4, 16).transpose(1, 2).transpose(1, 2).reshape(2, 6, 64),
    "channels permuted": lambda x: x.view(2, 6, 4, 16).transpose(2, 3).reshape(2, 6, 64),
    "permute": lambda x: x.permute(1, 0, 2).permute((1, 0, 2)),
    "rows joined": lambda x: x.reshape(-1, 64).relu().unsqueeze(0).squeeze(0).view(2, 6, 64),
    "gate": lambda x: torch.arange(1.0, 65.0).expand(2, 6, 64).sigmoid() * x,
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("between", PASSED)
def test_what_passes_factors_on(between: str, route: str) -> None:
    verdict, reason, error = folded(Before(PASSED[between]), "second", route)
    assert verdict == "applied", reason
    assert error < EXACT


REFUSED = {
    "sigmoid": torch.sigmoid,
    "gelu": torch.nn.functional.gelu,
    "softmax": lambda x: x.softmax(-1),
    "itself twice": lambda x: x * x,
    "a sum": lambda x: x + torch.arange(1.0, 65.0),
    "its mean": lambda x: x - x.mean(-1, keepdim=True),
    "channels mixed by rolling": lambda x: x.roll(1, -1),
    "channels broadcast": lambda x: x[..., :1] * torch.arange(1.0, 65.0),
    "in place": lambda x: x.relu_(),
    "rows and channels exchanged": lambda x: x.reshape(2, 64, 6).transpose(1, 2).reshape(2, 6, 64),
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("between", REFUSED)
def test_what_does_not_is_refused_and_right(between: str, route: str) -> None:
    verdict, reason, error = folded(Before(REFUSED[between]), "second", route)
    assert verdict == "skipped", reason
    assert reason.startswith("stays: ")
    assert error < EXACT


class Normed(nn.Module):
    """A norm and a linear."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.second = norm, nn.Linear(64, 64)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(x))


NORMS = {
    "layer norm": lambda: nn.LayerNorm(64),
    "without bias": lambda: nn.LayerNorm(64, bias=False),
    "rms norm": lambda: nn.RMSNorm(64, eps=1e-6),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("norm", NORMS)
def test_norms_take_factors(norm: str, route: str) -> None:
    verdict, reason, error = folded(Normed(NORMS[norm]()), "second", route)
    assert verdict == "applied", reason
    assert error < EXACT


@pytest.mark.parametrize("norm", [nn.LayerNorm(64, elementwise_affine=False), nn.LayerNorm((6, 64))])
def test_norms_without_a_weight_for_each_channel_do_not(norm: nn.Module) -> None:
    verdict, reason, error = folded(Normed(norm), "second")
    assert verdict == "skipped"
    assert "has no weight of its own to scale" in reason
    assert error < EXACT


def test_a_reader_that_was_not_equalized_forbids_it() -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.second, self.third = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            return self.second(normed) + nn.functional.linear(normed, self.third.weight * 2.0)

    verdict, reason, error = folded(TwoReaders(), "second")
    assert verdict == "skipped"
    assert "is also read by linear_1" in reason
    assert error < EXACT


@pytest.mark.parametrize(
    ("factors", "after", "before", "expected"),
    [
        ([1, 1, 8], [2, 3, 8], [2, 3, 2, 4], [1, 1, 2, 4]),
        ([1, 1, 2, 4], [2, 3, 2, 4], [2, 3, 8], [1, 1, 8]),
        ([1, 1, 8], [2, 3, 8], [6, 8], [1, 8]),
        ([1, 8], [6, 8], [2, 3, 8], [1, 1, 8]),
        ([1, 2, 1, 4], [5, 2, 3, 4], [5, 6, 4], [1, 6, 4]),
        ([1, 1, 1], [2, 3, 8], [48], [1]),
    ],
    ids=str,
)
def test_factors_through_a_reshape(
    factors: list[int], after: list[int], before: list[int], expected: list[int]
) -> None:
    values = torch.arange(1.0, 1.0 + torch.tensor(factors).prod()).reshape(factors)
    found = reshaped(values, after, before)
    assert found is not None
    assert list(found.shape) == expected
    assert torch.equal(found.expand(before).reshape(after), values.expand(after))
