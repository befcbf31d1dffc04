"""Which linears stay as heads and routers: by their place in the model, by both entrances, unless named."""

from __future__ import annotations

import pytest
import torch
from compiling import compiled
from torch import Tensor, nn

import mixq_compile as mixq

WIDTH, VOCABULARY = 64, 96
HEAD = "the output head stays in 16 or 32 bit"


class Block(nn.Module):
    """FLUX's single block: one projection out of attention and feed-forward, inside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_mlp = nn.Linear(WIDTH, 2 * WIDTH)
        self.proj_out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(nn.functional.gelu(self.proj_mlp(x)))


class Gated(nn.Module):
    """A feed-forward whose gate is named `gate`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(nn.functional.silu(self.gate(x)) * self.value(x))


class Mixture(nn.Module):
    """A router named `gate` that weighs two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 16)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., place : place + 1] * expert(x) for place, expert in enumerate(self.experts))


class Named(nn.Module):
    """Blocks, then a linear of some name that makes the output."""

    def __init__(self, name: str, outputs: int = 32) -> None:
        super().__init__()
        self.single_transformer_blocks = nn.ModuleList([Block(), Gated(), Mixture()])
        self.name = name
        self.add_module(name, nn.Linear(WIDTH, outputs))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.single_transformer_blocks:
            x = block(x)
        return self.get_submodule(self.name)(x)


class Inside(nn.Module):
    """A model as part of another, as `model.output` is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = Named(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Language(nn.Module):
    """A model whose head has a name like no other, but a row for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.unembed = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.unembed(self.inner(self.tokens(ids)))[:, -1:].float()


class Stem(nn.Module):
    """A linear named like a head that the model begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.relu(self.head(x)))


def rows() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def of(model: nn.Module, x: Tensor, route: str, **options: object) -> dict[str, str | None]:
    """Why each linear was left alone; None for those that are quantized."""
    torch.manual_seed(0)
    model.eval().requires_grad_(False)
    if route == "quantize":
        made = mixq.quantize(model, **options)
    else:
        made = compiled(model, **options)
        made(x)
    return {linear.fqn: linear.skip for linear in mixq.report(made).linears}


ENTRANCES = pytest.mark.parametrize("entrance", ["backend", "quantize"])
HEADS = ["proj_out", "output", "head", "classifier", "score", "lm_head", "embed_out"]


@ENTRANCES
@pytest.mark.parametrize("name", HEADS)
def test_the_linear_that_makes_the_output_stays(name, entrance):
    reasons = of(Named(name), rows(), entrance, ignore=())
    assert reasons[name] == HEAD


@ENTRANCES
@pytest.mark.parametrize("name", ["output", "score", "proj_out"])
def test_so_does_that_of_a_model_inside_another(name, entrance):
    reasons = of(Inside(name), rows(), entrance, ignore=())
    assert reasons[f"model.{name}"] == HEAD


@ENTRANCES
def test_a_proj_out_inside_a_block_and_the_gate_of_a_feed_forward_are_quantized(entrance):
    reasons = of(Named("proj_out"), rows(), entrance)
    blocks = "single_transformer_blocks"
    quantized = [f"{blocks}.0.proj_out", f"{blocks}.1.gate", f"{blocks}.1.value", f"{blocks}.2.experts.0"]
    assert {name: reasons[name] for name in quantized} == dict.fromkeys(quantized)


@ENTRANCES
def test_a_router_stays(entrance):
    reasons = of(Named("head"), rows(), entrance)
    assert reasons["single_transformer_blocks.2.gate"] == "a router, or a product that no linear module owns"


@ENTRANCES
def test_a_row_for_each_token_makes_a_head_of_any_name(entrance):
    reasons = of(Language(), torch.arange(10).reshape(2, 5), entrance)
    assert reasons == {"inner": None, "unembed": HEAD}


def test_a_head_that_the_model_itself_names_stays():
    class Told(Named):
        def get_output_embeddings(self) -> nn.Module:
            return self.single_transformer_blocks[1].out

    assert of(Told("inner"), rows(), "quantize")["single_transformer_blocks.1.out"] == HEAD


def test_a_graph_shows_that_a_linear_named_like_a_head_is_none():
    assert of(Stem(), rows(), "backend") == {"head": None, "inner": None}


@ENTRANCES
@pytest.mark.parametrize("ignore", [(), ("lm_head",), ("lm_head", "classifier")], ids=str)
@pytest.mark.parametrize("name", ["lm_head", "classifier"])
def test_an_entry_of_layers_wins_over_head_and_ignore(name, ignore, entrance):
    reasons = of(Named(name), rows(), entrance, ignore=ignore, layers={name: "w8a8"})
    assert reasons[name] is None


@ENTRANCES
def test_an_entry_of_layers_wins_over_a_router(entrance):
    reasons = of(Named("head"), rows(), entrance, layers={"*.2.gate": "w8a8"})
    assert reasons["single_transformer_blocks.2.gate"] is None


@ENTRANCES
def test_an_entry_for_everything_names_no_head(entrance):
    reasons = of(Named("head"), rows(), entrance, layers={"*": "w8a8"})
    assert reasons["head"] == HEAD
    assert reasons["single_transformer_blocks.0.proj_out"] is None


@pytest.mark.parametrize("route", ["aot"])
def test_an_exported_model_keeps_its_head_too(route):
    model = Named("score").eval().requires_grad_(False)
    rewritten, _ = mixq.compile(mixq.capture(model, (rows(),)), route, force=True)
    kept = [name for name, tensor in rewritten.state_dict.items() if tensor.shape == (32, WIDTH)]
    assert [rewritten.state_dict[name].dtype for name in kept] == [torch.float32]
