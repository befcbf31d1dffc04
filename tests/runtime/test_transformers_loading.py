"""transformers' `from_pretrained`: quantized directories load as saved, others as `quantize` makes them."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import ids, logits, tiny_llama, transformers
from torch import nn

import mixq_compile as mixq
from mixq_compile.checkpoints.directory import checked_tensors
from mixq_compile.errors import CheckpointError, OptionError
from mixq_compile.runtime.mixq_linear import MixqLinear

AUTO = transformers.AutoModelForCausalLM
QUANTIZED = 14


def warm(model: Any) -> Any:
    """The model after it has learned outlier columns."""
    logits(model, ids(seed=2))
    return model


def linears(model: Any) -> dict[str, MixqLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MixqLinear)}


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a 16-bit model."""
    path = tmp_path_factory.mktemp("ordinary")
    tiny_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A quantized directory of several shards, and logits of the model at that moment."""
    model = warm(mixq.quantize(tiny_llama()))
    path = tmp_path_factory.mktemp("quantized")
    mixq.save_pretrained(model, path, max_shard_size="60KB")
    return path, logits(model, ids())


class TestAQuantizedDirectory:
    def test_has_shards_an_index_and_a_card(self, saved: tuple[Path, Any]) -> None:
        names = sorted(path.name for path in saved[0].iterdir())
        assert names == [
            "README.md", "config.json", "generation_config.json",
            *(f"model-0000{place}-of-00003.safetensors" for place in (1, 2, 3)),
            "model.safetensors.index.json",
        ]  # fmt: skip
        card = (saved[0] / "README.md").read_text()
        assert f'AutoModelForCausalLM.from_pretrained("{saved[0].name}")' in card
        assert "| w8a8o16 | 14 linears: " in card

    def test_holds_columns_in_use_and_no_state_beside_them(self, saved: tuple[Path, Any]) -> None:
        index = json.loads((saved[0] / "model.safetensors.index.json").read_text())
        leaves = {
            name.rpartition(".")[2] for name in index["weight_map"] if ".layers.0.self_attn.q_proj." in name
        }
        assert leaves == {
            "weight", "weight_codes", "weight_scale", "outlier_columns", "outlier_maxima", "outlier_weight",
        }  # fmt: skip
        tensors = checked_tensors(saved[0])
        columns = tensors["model.layers.0.self_attn.q_proj.outlier_columns"].shape[0]
        assert 0 < columns < 16, "the test means a linear with fewer columns than slots"
        assert tensors["model.layers.0.self_attn.q_proj.outlier_weight"].shape == (64, columns)

    @pytest.mark.parametrize("dtype", ["auto", torch.float32])
    def test_loads_without_a_changed_bit(self, dtype: Any, saved: tuple[Path, Any]) -> None:
        model = AUTO.from_pretrained(saved[0], dtype=dtype)
        assert len(linears(model)) == QUANTIZED
        assert torch.equal(logits(model, ids()), saved[1])

    def test_loads_in_another_dtype_with_fp32_scales(self, saved: tuple[Path, Any]) -> None:
        model = AUTO.from_pretrained(saved[0], dtype=torch.bfloat16)
        found = logits(model, ids())
        assert found.dtype == torch.bfloat16
        assert {module.weight_scale.dtype for module in linears(model).values()} == {torch.float32}
        error = (found.float() - saved[1]).norm() / saved[1].norm()
        assert float(error) < 0.02

    def test_loads_in_the_class_that_is_asked_for(self, saved: tuple[Path, Any]) -> None:
        inner = transformers.AutoModel.from_pretrained(saved[0])
        whole = AUTO.from_pretrained(saved[0])
        with torch.no_grad():
            expected = whole.model(ids()).last_hidden_state
            assert torch.equal(inner(ids()).last_hidden_state, expected)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_is_as_good(self, copied: Any, saved: tuple[Path, Any], tmp_path: Path) -> None:
        model = copied(AUTO.from_pretrained(saved[0]))
        assert torch.equal(logits(model.to("cpu"), ids()), saved[1])
        model.save_pretrained(tmp_path)
        mixq.load_pretrained(tmp_path)

    def test_saves_again_as_it_was(self, saved: tuple[Path, Any], tmp_path: Path) -> None:
        AUTO.from_pretrained(saved[0]).save_pretrained(tmp_path, max_shard_size="60KB")
        before, after = checked_tensors(saved[0]), checked_tensors(tmp_path)
        assert before.keys() == after.keys()
        for name, entry in before.items():
            assert torch.equal(entry.read().view(torch.uint8), after[name].read().view(torch.uint8)), name

    def test_the_report_has_all_linears(self, saved: tuple[Path, Any]) -> None:
        report = mixq.report(AUTO.from_pretrained(saved[0]))
        assert len(report.quantized) == QUANTIZED
        assert [linear.fqn for linear in report.skipped] == ["lm_head"]

    def test_generates(self, saved: tuple[Path, Any]) -> None:
        given = ids(1, 4)
        texts = [
            model.generate(given, max_new_tokens=6, do_sample=False)
            for model in (AUTO.from_pretrained(saved[0]), mixq.load_pretrained(saved[0]))
        ]
        assert torch.equal(*texts)

    def test_dequantize_is_what_the_codes_stand_for(self, saved: tuple[Path, Any], tmp_path: Path) -> None:
        model = AUTO.from_pretrained(saved[0])
        module = model.get_submodule("model.layers.0.self_attn.q_proj")
        expected = module.dequantized_weight()
        columns = module.outlier_state().columns()
        expected[:, columns] = module.outlier_weight[:, : len(columns)]
        model = model.dequantize()
        linear = model.get_submodule("model.layers.0.self_attn.q_proj")
        assert columns, "the test means a linear with outlier columns"
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight, expected)
        model.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert torch.equal(logits(AUTO.from_pretrained(tmp_path), ids()), logits(model, ids()))

    def test_a_state_dict_in_place_of_files_is_refused(self, saved: tuple[Path, Any]) -> None:
        config = transformers.AutoConfig.from_pretrained(saved[0])
        with pytest.raises(CheckpointError, match="loaded from its safetensors files, which were not given"):
            transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})

    def test_a_shard_of_another_model_is_refused(self, saved: tuple[Path, Any], tmp_path: Path) -> None:
        for path in saved[0].iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        other = tmp_path / "other"
        mixq.save_pretrained(mixq.quantize(tiny_llama(hidden_size=128)), other, max_shard_size="60KB")
        shard = "model-00002-of-00003.safetensors"
        (tmp_path / shard).write_bytes(next(other.glob("model-00002-of-*")).read_bytes())
        with pytest.raises(CheckpointError, match=r"is both in .*00001.* and in|do not hold the tensors"):
            AUTO.from_pretrained(tmp_path)

    def test_frozen_and_overflowed_states_stay_so(self, tmp_path: Path) -> None:
        model = mixq.quantize(tiny_llama(), threshold=0.5, capacity=16)
        warm(model)
        mixq.freeze(model)
        loaded = AUTO.from_pretrained(mixq.save_pretrained(model, tmp_path))
        pairs = [(linears(model)[name], module) for name, module in linears(loaded).items()]
        assert any(module.outlier_state().overflow() for module, _ in pairs), "the test means full states"
        for before, after in pairs:
            assert torch.equal(before.counters, after.counters)
            assert torch.equal(before.effective_threshold, after.effective_threshold)
        assert torch.equal(logits(loaded, ids(seed=3)), logits(model, ids(seed=3)))

    def test_columns_that_no_call_fetched_yet_have_their_weights(self, tmp_path: Path) -> None:
        model = warm(mixq.quantize(tiny_llama()))
        module = model.model.layers[0].self_attn.q_proj
        assert module.outlier_state().columns()
        module.cached_index.fill_(-1)
        loaded = AUTO.from_pretrained(mixq.save_pretrained(model, tmp_path))
        assert torch.equal(logits(loaded, ids()), logits(model, ids()))

    def test_a_conv1d_comes_back_as_one(self, tmp_path: Path) -> None:
        config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32)
        model = warm(mixq.quantize(transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)))
        loaded = AUTO.from_pretrained(mixq.save_pretrained(model, tmp_path / "codes"))
        assert torch.equal(logits(loaded, ids()), logits(model, ids()))
        ordinary = loaded.dequantize()
        ordinary.save_pretrained(tmp_path / "ordinary")
        again = AUTO.from_pretrained(tmp_path / "ordinary")
        assert type(again.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
        assert torch.equal(logits(again, ids()), logits(ordinary, ids()))


OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "no outliers": {"scheme": "w8a8"},
    "by layer": {"layers": {"*.down_proj": "w8a16"}, "ignore": ("lm_head", "*.o_proj")},
}


class TestQuantizingWhileLoading:
    @pytest.mark.parametrize("case", OPTIONS)
    def test_gives_what_quantize_gives(self, case: str, ordinary: Path) -> None:
        model = AUTO.from_pretrained(ordinary, quantization_config=mixq.MixqConfig(**OPTIONS[case]))
        expected = mixq.quantize(tiny_llama(), **OPTIONS[case])
        assert linears(model).keys() == linears(expected).keys()
        for name, module in linears(model).items():
            assert torch.equal(module.weight_codes, linears(expected)[name].weight_codes), name
        assert torch.equal(logits(model, ids()), logits(expected, ids()))
        assert [linear.skip for linear in mixq.report(model).linears] == [
            linear.skip for linear in mixq.report(expected).linears
        ]

    def test_biases_come_along(self, tmp_path: Path) -> None:
        model = tiny_llama(attention_bias=True, mlp_bias=True)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        model.save_pretrained(tmp_path)
        loaded = AUTO.from_pretrained(tmp_path, quantization_config=mixq.MixqConfig())
        assert torch.equal(logits(loaded, ids()), logits(mixq.quantize(model), ids()))

    def test_calibrated_columns_are_the_same(self, ordinary: Path, tmp_path: Path) -> None:
        stats = mixq.calibrate(tiny_llama(), [ids(4, 12)])
        stats.save(tmp_path / "stats.safetensors")
        options = {"scheme": "w4a4o16", "stats": str(tmp_path / "stats.safetensors"), "miss": "static"}
        model = AUTO.from_pretrained(ordinary, quantization_config=mixq.MixqConfig(**options))
        expected = mixq.quantize(tiny_llama(), **options)
        assert torch.equal(logits(model, ids()), logits(expected, ids()))
        model.save_pretrained(tmp_path / "saved")
        entry = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
        assert entry["calibration"]["statistics_sha256"] == stats.sha256()

    def test_tied_embeddings_stay_tied(self, tmp_path: Path) -> None:
        tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
        options: dict[str, Any] = {"ignore": ()}
        model = AUTO.from_pretrained(tmp_path, quantization_config=mixq.MixqConfig(**options))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        expected = mixq.quantize(tiny_llama(tie_word_embeddings=True), **options)
        assert torch.equal(logits(model, ids()), logits(expected, ids()))

    def test_wrong_options_are_named(self) -> None:
        with pytest.raises(OptionError, match="unknown scheme 'w9'"):
            mixq.MixqConfig("w9")
        with pytest.raises(OptionError, match="takes no option 'bits'"):
            mixq.MixqConfig(bits=8)
        with pytest.raises(OptionError, match="4-bit codes are too coarse"):
            mixq.MixqConfig("w4a8o16")

    def test_a_quantized_directory_keeps_its_own_scheme(self, saved: tuple[Path, Any]) -> None:
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):
            model = AUTO.from_pretrained(saved[0], quantization_config=mixq.MixqConfig("w8a8"))
        assert {module.scheme.name for module in linears(model).values()} == {"w8a8o16"}


IMPORTS = {
    "before transformers": "import mixq_compile, transformers",
    "after transformers": "import transformers, mixq_compile",
    "after its quantizers": "import transformers.quantizers.auto, transformers, mixq_compile",
}


@pytest.mark.parametrize("case", IMPORTS)
def test_the_format_is_known_whichever_import_comes_first(case: str, saved: tuple[Path, Any]) -> None:
    program = (
        f"{IMPORTS[case]}\nimport sys\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(saved[0])], capture_output=True, text=True)
    assert done.stdout.strip() == "MixqLinear", done.stderr[-2000:]


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    program = "import sys, mixq_compile; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
