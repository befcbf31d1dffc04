"""Small transformers models by configuration, for passes that read norms, attention and gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captures import capture
from rewriting import run
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import History

transformers = pytest.importorskip("transformers")

VOCABULARY = 96
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4},
    "gemma": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
              "num_key_value_heads": 4, "head_dim": 16},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
            "word_embed_proj_dim": 64},
    "bert": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_inner": 96},
}  # fmt: skip
CLASSES = {"llama": "Llama", "gemma": "Gemma", "opt": "OPT", "bert": "Bert", "gpt2": "GPT2"}
HEADS = {"gpt2": "LMHeadModel", "bert": "Model"}


class Logits(nn.Module):
    """A model that takes tokens and returns one tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.m = model

    def forward(self, tokens: Tensor) -> Tensor:
        options = {} if self.m.config.model_type == "bert" else {"use_cache": False}
        return self.m(tokens, **options)[0]


def transformer(kind: str, **changes: Any) -> Logits:
    """A model with random weights, biases and norms, the same in every call."""
    torch.manual_seed(0)
    name = CLASSES[kind]
    config = getattr(transformers, f"{name}Config")(
        **{**SIZES[kind], "vocab_size": VOCABULARY, "max_position_embeddings": 32, **changes}
    )
    config.pad_token_id = 0
    model = getattr(transformers, name + HEADS.get(kind, "ForCausalLM"))(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        # Norms of ones and biases of zeros would hide what is left out.
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.mul_(4.0)
    return Logits(model)


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    """Random tokens."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def rewritten(
    model: Logits, text: str, route: str = "export", inputs: Tensor | None = None, **options: Any
) -> tuple[CapturedGraph, History]:
    """The graph of a model, and what a pipeline with the model's own statistics did to it."""
    inputs = tokens() if inputs is None else inputs
    stats = mixq.calibrate(model, [(inputs,)])
    graph = capture(model, inputs, route=route, **options)
    return graph, run(graph, text, stats=stats)


@torch.no_grad()
def output(graph: CapturedGraph, inputs: Tensor) -> Tensor:
    """What a graph computes; those placeholders that are no parameters are given the inputs."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    given = [graph.tensor(node) for node in placeholders]
    result = graph.module(*(inputs if tensor is None else tensor for tensor in given))
    return result[0] if isinstance(result, (tuple, list)) else result


def difference(graph: CapturedGraph, model: Logits, inputs: Tensor | None = None) -> float:
    """How far a graph is off its model, relative to what the model gives."""
    inputs = tokens() if inputs is None else inputs
    with torch.no_grad():
        exact = model.double()(inputs)
        model.float()
    return float((output(graph, inputs) - exact).norm() / exact.norm())
