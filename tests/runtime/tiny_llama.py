"""A Llama of two small layers, for the tests that need a transformers model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCABULARY = 96


def tiny_llama(**changes: Any) -> Any:
    """A Llama with random weights, the same in every call, whose second token is an outlier's."""
    settings: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes}))
    model = model.eval().requires_grad_(False)
    nn.init.normal_(model.model.embed_tokens.weight)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[5] = 30.0
    return model


def ids(rows: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    """Random tokens."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: Tensor) -> Tensor:
    """The model's logits, without a cache."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits
