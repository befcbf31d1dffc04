from pathlib import Path

import pytest
import torch
from commands import mixq  # noqa: F401  # puts the folder of tiny_models on the path
from shared_data import minilm_folder, shared_data

from mixq_compile.cli.models import load_model, resolve_device
from mixq_compile.errors import CheckpointError, MixqError, OptionError


def test_a_function_that_returns_model_and_tokenizer() -> None:
    loaded = load_model("tiny_models:llama", "cpu")
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not loaded.model.training
    assert loaded.dtype == "float32"
    assert loaded.required_tokenizer()("ab")["input_ids"]
    loaded.require_language_model()


def test_a_function_builds_the_same_model_each_time() -> None:
    first, second = (load_model("tiny_models:bert", "cpu").model for _ in range(2))
    assert torch.equal(first.embeddings.word_embeddings.weight, second.embeddings.word_embeddings.weight)


def test_a_model_without_tokenizer_says_so_when_one_is_needed() -> None:
    loaded = load_model("tiny_models:bert", "cpu", "bfloat16")
    assert loaded.dtype == "bfloat16"
    with pytest.raises(MixqError, match=r"no tokenizer .*return \(model, tokenizer\)"):
        loaded.required_tokenizer()
    with pytest.raises(MixqError, match="is a BertModel, which does not predict the next token"):
        loaded.require_language_model()


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("tiny_models:lama", OptionError, "Did you mean 'llama'"),
        ("tiny_modles:llama", MixqError, "there is no module 'tiny_modles'"),
        ("tiny_models:nothing", OptionError, "returned a NoneType"),
        ("./absent/folder", OptionError, "does not exist"),
        (__file__, OptionError, "is a file"),
        ("someone/absent-model", MixqError, "no model 'someone/absent-model'"),
    ],
)
def test_what_cannot_be_loaded(source: str, kind: type[MixqError], message: str) -> None:
    with pytest.raises(kind, match=message):
        load_model(source, "cpu")


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        load_model(str(tmp_path), "cpu")


def test_a_corrupt_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MixqError, match="configuration of"):
        load_model(str(tmp_path), "cpu")


def test_the_class_is_that_of_the_config() -> None:
    loaded = load_model(str(shared_data("stories260k")), "cpu")
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert type(load_model(str(minilm_folder()), "cpu").model).__name__ == "BertModel"


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(OptionError, match="unknown device 'gpu'"):
        resolve_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(MixqError, match="device 'cuda' was asked for"):
        resolve_device("cuda")
