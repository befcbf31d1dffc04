"""Untrained models and a tokenizer of single letters, for `module:function`."""

from __future__ import annotations

import string
from typing import Any

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LETTERS = [*string.printable]
VOCABULARY = len(SPECIAL) + len(LETTERS)


def tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    numbers = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    made = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = Fuse()
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", numbers["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def llama(width: int = 32) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=VOCABULARY, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer()


def narrow() -> tuple[Any, Any]:
    """A model whose linears are all too small."""
    return llama(width=8)


def bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=300
    )
    return BertModel(config)


def encoder() -> tuple[Any, Any]:
    return bert(), tokenizer()


def masked() -> tuple[Any, Any]:
    from transformers import BertForMaskedLM

    return BertForMaskedLM(bert().config), tokenizer()


def convolution() -> Any:
    import torch

    return torch.nn.Conv2d(3, 8, 3)


def nothing() -> None:
    return None


def differences(steps: int = 12) -> tuple[Any, None, Any]:
    """A chain of layers that each subtract their offset: exchanging operands of one changes the result."""
    import torch
    from torch import nn

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.rand(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - self.offset

    return nn.Sequential(*(Shift() for _ in range(steps))), None, torch.full((2, 4), 20.0)


def positions() -> tuple[Any, None, Any]:
    """A model that returns no floating-point number."""
    import torch
    from torch import nn

    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.rand(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - self.offset).argmax(-1)

    return Largest(), None, torch.eye(4)
