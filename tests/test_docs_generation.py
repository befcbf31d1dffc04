"""The Python of docs/generation.md runs, in order, and its table of options is that of the dataclass."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mixq_compile.runtime.generation import prepared_generation
from mixq_compile.runtime.generation_options import GenerationOptions

transformers = pytest.importorskip("transformers")

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "generation.md"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def small_model() -> Any:
    """A Llama of one layer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        max_position_embeddings=256, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


class Tokens(dict[str, torch.Tensor]):
    """What a tokenizer returns."""


def tokenizer(text: str, return_tensors: str) -> Tokens:
    """A token for each letter."""
    ids = torch.tensor([[ord(letter) % 64 for letter in text]])
    return Tokens(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import mixq_compile.runtime.generation as generation

    compiled = torch.compile
    # Without generating code: the examples must run, and how fast is not said here.
    monkeypatch.setattr(
        generation.torch,
        "compile",
        lambda function, backend, dynamic, **options: compiled(function, backend="eager", dynamic=dynamic),
    )
    names = ("model", "other_model", "third_model", "server_model")
    scope: dict[str, Any] = {name: small_model() for name in names} | {"tokenizer": tokenizer}
    blocks = [block["code"] for block in BLOCK.finditer(DOCUMENT.read_text())]
    assert len(blocks) == 4
    for code in blocks:
        exec(compile(code, str(DOCUMENT), "exec"), scope)
    assert scope["text"].shape[1] == len("Once upon a time") + 8
    assert prepared_generation(scope["model"]) is None
    assert prepared_generation(scope["server"]).compiled, "warming up compiled nothing"


def test_every_option_is_in_the_table() -> None:
    text = DOCUMENT.read_text()
    table = text[text.index("## Options") : text.index("Each batch and cache length")]
    named = set(
        re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    assert named == {entry.name for entry in dataclasses.fields(GenerationOptions)}
