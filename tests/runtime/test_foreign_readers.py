"""Who does not know this package reads a quantized model's files with an error, never as another model."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import block, compiled
from tiny_llama import ids, logits, tiny_llama, transformers
from torch import nn

import mixq_compile as mixq
from mixq_compile.errors import CheckpointError, OptionError
from mixq_compile.runtime.mixq_linear import MixqLinear


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as it is in a process that never imported this package."""
    from transformers.quantizers import auto

    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, "mixq", raising=False)


REFUSAL = "ignore_mismatched_sizes|size mismatch"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a saved model, to be read only."""
    return mixq.save_pretrained(mixq.quantize(tiny_llama()), tmp_path_factory.mktemp("saved"))


READERS = [
    "AutoModelForCausalLM",
    "AutoModel",
    "LlamaForCausalLM",
    "LlamaModel",
    "LlamaForSequenceClassification",
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.usefixtures("stranger")
def test_transformers_raises(reader: str, dtype: str, directory: Path) -> None:
    with pytest.raises(RuntimeError, match=REFUSAL):
        getattr(transformers, reader).from_pretrained(directory, dtype=dtype)


def test_transformers_raises_in_a_process_of_its_own(directory: Path) -> None:
    program = (
        "import sys, transformers\n"
        "try:\n    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except RuntimeError as error:\n    print('refused', 'ignore_mismatched_sizes' in str(error))\n"
        "assert not [name for name in sys.modules if name.startswith('mixq_compile')]\n"
    )
    command = [sys.executable, "-c", program, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused True", done.stderr


def test_transformers_raises_without_the_config_entry(directory: Path, tmp_path: Path) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=REFUSAL):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no quantization_config"):
        mixq.load_pretrained(tmp_path)


@pytest.mark.usefixtures("stranger")
def test_transformers_raises_for_a_model_with_fewer_layers(directory: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(directory)
    config.num_hidden_layers = 1
    with pytest.raises(RuntimeError, match=REFUSAL):
        transformers.LlamaForCausalLM.from_pretrained(directory, config=config)


@pytest.mark.usefixtures("stranger")
def test_a_model_of_which_one_linear_is_quantized(tmp_path: Path) -> None:
    model = mixq.quantize(tiny_llama(), ignore=["*layers.0.*", "*self_attn*", "*gate*", "*down*", "lm_head"])
    assert [name for name, module in model.named_modules() if isinstance(module, MixqLinear)] == [
        "model.layers.1.mlp.up_proj"
    ]
    mixq.save_pretrained(model, tmp_path)
    for reader in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        with pytest.raises(RuntimeError, match=REFUSAL):
            reader.from_pretrained(tmp_path)


@pytest.mark.usefixtures("stranger")
def test_a_conv1d_model_raises(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32)
    model = mixq.quantize(transformers.GPT2LMHeadModel(config).eval().requires_grad_(False))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=REFUSAL):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(mixq.load_pretrained(tmp_path), ids()), logits(model, ids()))


def test_what_the_config_says(tmp_path: Path) -> None:
    model = mixq.quantize(tiny_llama(), layers={"*.down_proj": "w8a16"})
    mixq.save_pretrained(model, tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {name: entry[name] for name in ("quant_method", "schema_version", "scheme", "dtype")} == {
        "quant_method": "mixq",
        "schema_version": 3,
        "scheme": "w8a8o16",
        "dtype": "float32",
    }
    assert entry["modules"]["model.layers.1.mlp.down_proj"] == {
        "scheme": "w8a16",
        "recipe": "weight=int8 absmax; activation=none; outliers=static inf",
        "shape": [64, 128],
        "dtype": "float32",
    }
    assert len(entry["modules"]) == 14
    assert entry["modules_to_not_convert"]["lm_head"]["skip"] == "ignored: its name matches 'lm_head'"


def test_saving_leaves_the_models_config_alone(tmp_path: Path) -> None:
    model = mixq.quantize(tiny_llama())
    before = copy.deepcopy(model.config.to_dict())
    mixq.save_pretrained(model, tmp_path)
    assert model.config.to_dict() == before
    loaded = mixq.load_pretrained(tmp_path)
    assert loaded.config.quantization_config.to_dict()["quant_method"] == "mixq"
    mixq.save_pretrained(loaded, tmp_path / "again")
    assert "quantization_config" in json.loads((tmp_path / "again" / "config.json").read_text())


STATES: dict[str, Callable[[Any, Path], object]] = {
    "load_state_dict": lambda model, _: tiny_llama().load_state_dict(model.state_dict()),
    "load_state_dict, not strict": lambda model, _: tiny_llama().load_state_dict(
        model.state_dict(), strict=False
    ),
    "assign": lambda model, _: tiny_llama().load_state_dict(model.state_dict(), assign=True, strict=False),
}


@pytest.mark.parametrize("case", STATES)
def test_an_ordinary_model_refuses_the_state_of_a_swapped_one(case: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.self_attn\.q_proj\.weight"):
        STATES[case](mixq.quantize(tiny_llama()), tmp_path)


@pytest.mark.parametrize("strict", [True, False])
def test_an_ordinary_model_refuses_a_file_of_save_model(strict: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    save_model(mixq.quantize(tiny_llama()), str(tmp_path / "state.safetensors"))
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        load_model(tiny_llama(), tmp_path / "state.safetensors", strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_swapped_model_refuses_the_state_of_an_ordinary_one(strict: bool) -> None:
    with pytest.raises(RuntimeError, match=r"up_proj\.weight is the weight of an ordinary linear"):
        mixq.quantize(block()).load_state_dict(block().state_dict(), strict=strict)


COPIES: dict[str, Callable[[Any], Any]] = {
    "the model": lambda model: model,
    "a copy": copy.deepcopy,
    "an unpickled one": lambda model: pickle.loads(pickle.dumps(model)),
    "a compiled one": compiled,
}


class TestTheModelsOwnMethods:
    @pytest.mark.parametrize("case", COPIES)
    def test_save_pretrained_writes_a_quantized_directory(self, case: str, tmp_path: Path) -> None:
        model = mixq.quantize(tiny_llama())
        COPIES[case](model).save_pretrained(tmp_path)
        assert torch.equal(logits(mixq.load_pretrained(tmp_path), ids()), logits(model, ids()))

    def test_a_copy_saves_itself(self, tmp_path: Path) -> None:
        model = mixq.quantize(tiny_llama())
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            copied.model.norm.weight.fill_(2.0)
            copied.save_pretrained(tmp_path)
            assert float(mixq.load_pretrained(tmp_path).model.norm.weight[0]) == 2.0

    def test_a_loaded_model_and_a_part_of_one(self, directory: Path, tmp_path: Path) -> None:
        loaded = mixq.load_pretrained(directory)
        loaded.save_pretrained(tmp_path / "whole")
        assert torch.equal(logits(mixq.load_pretrained(tmp_path / "whole"), ids()), logits(loaded, ids()))
        loaded.model.save_pretrained(tmp_path / "part")
        part = mixq.load_pretrained(tmp_path / "part")
        with torch.no_grad():
            found, expected = part(ids()).last_hidden_state, loaded.model(ids()).last_hidden_state
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"push_to_hub": True},
            {"safe_serialization": False},
            {"variant": "fp16"},
            {"state_dict": {}},
            {"is_main_process": False},
            {"save_peft_format": False},
            {"no_such": 1},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_options_that_mean_something_else_are_refused_by_name(
        self, options: dict[str, Any], tmp_path: Path
    ) -> None:
        (name,) = options
        with pytest.raises(OptionError, match=f"save_pretrained takes no {name}="):
            mixq.quantize(tiny_llama()).save_pretrained(tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()

    def test_options_that_ask_for_what_is_done_are_taken(self, tmp_path: Path) -> None:
        model = mixq.quantize(tiny_llama())
        model.save_pretrained(tmp_path, safe_serialization=True, is_main_process=True, push_to_hub=False)
        mixq.load_pretrained(tmp_path)

    def test_push_to_hub_is_refused(self) -> None:
        model = mixq.quantize(tiny_llama())
        for pushing in (model, copy.deepcopy(model), compiled(model)):
            with pytest.raises(CheckpointError, match="cannot be pushed to a hub from memory"):
                pushing.push_to_hub("someone/something")

    def test_an_ordinary_model_keeps_its_own(self, tmp_path: Path) -> None:
        model = tiny_llama()
        model.save_pretrained(tmp_path)
        assert "save_pretrained" not in model.__dict__
        assert torch.equal(
            logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ids()), logits(model, ids())
        )

    def test_nothing_swapped_keeps_its_own(self, tmp_path: Path) -> None:
        model = tiny_llama()
        with pytest.warns(UserWarning, match="quantized none"):
            mixq.quantize(model, ignore=["layers", "lm_head"])
        model.save_pretrained(tmp_path)
        assert torch.equal(
            logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ids()), logits(model, ids())
        )


SAVERS: dict[str, Callable[[Any, Path], None]] = {
    "the class's own method": lambda model, d: transformers.PreTrainedModel.save_pretrained(model, d),
    "in shards": lambda model, d: transformers.PreTrainedModel.save_pretrained(
        model, d, max_shard_size="60KB"
    ),
}


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.usefixtures("stranger")
def test_what_transformers_own_code_writes_does_not_load_either(saver: str, tmp_path: Path) -> None:
    SAVERS[saver](mixq.quantize(tiny_llama()), tmp_path)
    with pytest.raises(RuntimeError, match=REFUSAL):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.usefixtures("stranger")
def test_a_model_whose_inner_model_was_swapped(tmp_path: Path) -> None:
    """The outer model was never seen by `quantize`: transformers writes it, and nobody reads it wrongly."""
    model = tiny_llama()
    mixq.quantize(model.model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=REFUSAL):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.usefixtures("stranger")
def test_a_linear_that_was_swapped_by_hand(tmp_path: Path) -> None:
    from mixq_compile.schemes.registry import get_scheme

    model = tiny_llama()
    linear: nn.Module = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = MixqLinear.from_linear(linear, get_scheme("w8a8o16"))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=REFUSAL):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
