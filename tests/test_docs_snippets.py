"""Every Python snippet of the README and of docs/ runs as printed: with its own imports, on a CPU."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import mixq_compile as mixq
from mixq_compile.runtime import compiled_graph
from mixq_compile.runtime import generation as prepared

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
ELSEWHERE = ("adding.md", "generation.md")
"""Documents whose snippets build on each other: test_docs_adding.py and test_docs_generation.py run them."""


def snippets() -> list[Any]:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        pytest.param(block["code"], id=f"{path.name}-{number}")
        for path in documents
        if path.name not in ELSEWHERE
        for number, block in enumerate(BLOCK.finditer(path.read_text()), 1)
    ]


class Tokenizer:
    """A token for each letter."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[ord(letter) % 64 for letter in text]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def small_model(kind: str = "LlamaForCausalLM") -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        max_position_embeddings=2048, pad_token_id=0, eos_token_id=None, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval().requires_grad_(False)


@pytest.fixture
def scope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What a reader has: a model, inputs, batches, statistics; `path/to/model` is a small Llama."""
    for name, kind in {"AutoModel": "LlamaModel", "AutoModelForCausalLM": "LlamaForCausalLM"}.items():
        monkeypatch.setattr(
            getattr(transformers, name),
            "from_pretrained",
            lambda path, kind=kind, **options: small_model(kind),
        )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: Tokenizer())
    # Without generating code: snippets must run, and how fast is not said here.
    monkeypatch.setattr(compiled_graph, "_lower", lambda module, inputs, options: module)
    whole = torch.compile
    monkeypatch.setattr(
        prepared.torch, "compile",
        lambda function, backend, **options: whole(
            function, backend="eager" if backend == "inductor" else backend,
            **{name: value for name, value in options.items() if name not in ("mode",)},
        ),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    ids = torch.arange(24).reshape(2, 12) % 64
    batches = [{"input_ids": ids, "use_cache": False}]
    model = small_model()
    stats = mixq.calibrate(model, batches)
    return {"model": model, "inputs": dict(batches[0]), "batches": batches, "ids": ids, "stats": stats}


@pytest.mark.parametrize("code", snippets())
def test_it_runs(code, scope):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "snippet", "exec"), scope)


def test_there_are_snippets_of_each_kind():
    names = [each.id.partition("-")[0] for each in snippets()]
    assert names.count("README.md") >= 5
    assert {"inspection.md", "passes.md", "area.md"} <= set(names)
