"""`save_pretrained` and `load_pretrained`: no bit changes, and every damaged file is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import FEATURES, block
from linear_models import statistics
from tiny_llama import ids, logits, tiny_llama, transformers
from torch import nn

import mixq_compile as mixq
from mixq_compile.errors import CheckpointError
from mixq_compile.runtime.mixq_linear import MixqLinear

OPTIONS: dict[str, dict[str, Any]] = {
    "w8a8o16": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "no outliers": {"scheme": "w8a8"},
    "weight only": {"scheme": "w8a16"},
    "by layer": {"layers": {"*.down_proj": "w8a16"}, "capacity": 32, "threshold": 3.0},
    "invariant": {"batch_invariant": True},
}


def quantized(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return mixq.quantize(tiny_llama().to(dtype), **options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a saved model, to be read only."""
    return mixq.save_pretrained(quantized(), tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("case", OPTIONS)
def test_a_round_trip_changes_no_bit(case: str, tmp_path: Path) -> None:
    model = quantized(**OPTIONS[case])
    logits(model, ids(seed=2))
    loaded = mixq.load_pretrained(mixq.save_pretrained(model, tmp_path))
    assert not loaded.training
    expected = logits(model, ids())
    found = logits(loaded, ids())
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) == 0.0


def test_four_bits_with_calibrated_columns_round_trip(tmp_path: Path) -> None:
    model = tiny_llama()
    stats = mixq.calibrate(model, [ids(4, 12)])
    mixq.quantize(model, "w4a4o16", stats=stats, miss="static")
    loaded = mixq.load_pretrained(mixq.save_pretrained(model, tmp_path))
    assert torch.equal(logits(loaded, ids()), logits(model, ids()))
    mixq.reset(loaded)
    assert torch.equal(logits(loaded, ids()), logits(model, ids())), "a reset forgot calibrated columns"


def test_a_loaded_model_starts_warm(tmp_path: Path) -> None:
    model = quantized()
    logits(model, ids())
    learned = [m.outlier_state().columns() for m in model.modules() if isinstance(m, MixqLinear)]
    assert any(learned)
    loaded = mixq.load_pretrained(mixq.save_pretrained(model, tmp_path))
    assert [m.outlier_state().columns() for m in loaded.modules() if isinstance(m, MixqLinear)] == learned


def test_tied_embeddings_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    model = mixq.quantize(tiny_llama(tie_word_embeddings=True))
    loaded = mixq.load_pretrained(mixq.save_pretrained(model, tmp_path))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded, ids()), logits(model, ids()))


def test_tensors_of_another_dtype_than_the_model_keep_it(tmp_path: Path) -> None:
    model = quantized(torch.bfloat16)
    for layer in model.model.layers:
        layer.input_layernorm.float()
    loaded = mixq.load_pretrained(mixq.save_pretrained(model, tmp_path))
    norm = loaded.model.layers[0].input_layernorm.weight
    assert norm.dtype == torch.float32
    assert torch.equal(norm, model.model.layers[0].input_layernorm.weight)
    assert loaded.dtype == torch.bfloat16


def test_generation_settings_come_along(tmp_path: Path) -> None:
    model = quantized()
    model.generation_config.max_new_tokens = 17
    assert mixq.load_pretrained(mixq.save_pretrained(model, tmp_path)).generation_config.max_new_tokens == 17


def test_a_conv1d_model_round_trips(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=32)
    model = mixq.quantize(transformers.GPT2LMHeadModel(config).eval().requires_grad_(False))
    loaded = mixq.load_pretrained(mixq.save_pretrained(model, tmp_path))
    assert torch.equal(logits(loaded, ids()), logits(model, ids()))


def test_the_report_of_a_loaded_model_lists_its_linears(directory: Path) -> None:
    report = mixq.report(mixq.load_pretrained(directory))
    assert len(report.quantized) == 14
    assert {linear.role for linear in report.quantized} == {"q", "k", "v", "o", "gate", "up", "down"}


def test_the_directory_is_smaller_than_the_model(directory: Path) -> None:
    tensors = (directory / "model.safetensors").stat().st_size
    assert tensors < 0.7 * sum(parameter.nbytes for parameter in tiny_llama().parameters())


class TestSaving:
    def test_a_model_that_was_not_quantized(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no MixqLinear to save: call mixq_compile\.quantize"):
            mixq.save_pretrained(tiny_llama(), tmp_path)

    def test_a_model_without_a_config(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="a Block has no transformers config"):
            mixq.save_pretrained(mixq.quantize(block()), tmp_path)

    def test_folders_are_made(self, tmp_path: Path) -> None:
        mixq.save_pretrained(quantized(), tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b" / "mixq.json").is_file()


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def _first_linear(manifest: dict[str, Any]) -> dict[str, Any]:
    return next(iter(manifest["linears"].values()))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda d: (d / "mixq.json").unlink(), r"holds no mixq\.json"),
    "no tensors": (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors is corrupt"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json is corrupt"),
    "manifest cut": (lambda d: (d / "mixq.json").write_text('{"schema'), r"mixq\.json is corrupt"),
    "manifest is a list": (lambda d: (d / "mixq.json").write_text("[]"), r"mixq\.json is corrupt"),
    "tensors cut": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:1000]),
        r"model\.safetensors is corrupt",
    ),
    "tensors empty": (lambda d: (d / "model.safetensors").write_bytes(b""), r"model\.safetensors is corrupt"),
    "config cut": (lambda d: (d / "config.json").write_text("{"), r"config\.json is corrupt"),
    "other version": (
        lambda d: _edit(d / "mixq.json", lambda m: m.update(schema_version=3)),
        r"mixq\.json has schema version 3, and this release reads 1 and 2: quantize again",
    ),
    "other scheme version": (
        lambda d: _edit(d / "mixq.json", lambda m: _first_linear(m)["scheme"].update(version=9)),
        r"mixq\.json is corrupt .*schema version 9",
    ),
    "unknown architecture": (
        lambda d: _edit(d / "mixq.json", lambda m: m.update(architecture="NoSuchModel")),
        "this transformers has no 'NoSuchModel'",
    ),
    "unknown dtype": (
        lambda d: _edit(d / "mixq.json", lambda m: m.update(dtype="float17")),
        r"mixq\.json is corrupt",
    ),
    "a field is missing": (
        lambda d: _edit(d / "mixq.json", lambda m: _first_linear(m).pop("bias")),
        r"mixq\.json is corrupt .*bias",
    ),
    "a linear that the model lacks": (
        lambda d: _edit(
            d / "mixq.json", lambda m: m["linears"].update({"model.nowhere.x": _first_linear(m)})
        ),
        r"mixq\.json is corrupt",
    ),
    "a linear of another shape": (
        lambda d: _edit(d / "mixq.json", lambda m: _first_linear(m).update(in_features=32)),
        r"model\.safetensors does not fit the files beside it",
    ),
    "a linear that is not quantized": (
        lambda d: _edit(d / "mixq.json", lambda m: m["linears"].popitem()),
        r"model\.safetensors does not fit the files beside it",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_directories_name_the_file(case: str, directory: Path, tmp_path: Path) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage, message = DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        mixq.load_pretrained(tmp_path)


def test_a_directory_that_is_none() -> None:
    with pytest.raises(
        CheckpointError, match=r"holds no mixq\.json: mixq_compile\.save_pretrained did not write it"
    ):
        mixq.load_pretrained("/no/such/directory")


def test_statistics_of_a_part_are_those_of_the_whole(tmp_path: Path) -> None:
    """A saved model keeps which columns were calibrated, not the statistics themselves."""
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES))
    mixq.quantize(model, stats=statistics({"0": {3: 9.0}}), miss="static", threshold=6.0)
    assert model[0].calibrated == ((3, 9.0),)
