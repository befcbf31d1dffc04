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
        with pytest.raises(
            CheckpointError, match="a Block is no transformers model with a config, so nothing would build it"
        ):
            mixq.save_pretrained(mixq.quantize(block()), tmp_path)

    def test_folders_are_made(self, tmp_path: Path) -> None:
        mixq.save_pretrained(quantized(), tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b" / "config.json").is_file()


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def _first_linear(entry: dict[str, Any]) -> dict[str, Any]:
    return next(iter(entry["modules"].values()))


def _tensors(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda d: (d / "model.safetensors").write_bytes(change((d / "model.safetensors").read_bytes()))


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda d: _edit(d / "config.json", change)


def _without(name: str) -> Callable[[Path], object]:
    """Leaves a tensor out of the file."""

    def damage(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(directory / "model.safetensors")
        del tensors[name]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tensors": (lambda d: (d / "model.safetensors").unlink(), r"holds neither model\.safetensors nor"),
    "no config": (lambda d: (d / "config.json").unlink(), r"holds no config\.json: it is no quantized dir"),
    "config cut": (lambda d: (d / "config.json").write_text('{"a'), r"config\.json is corrupt"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), r"config\.json is corrupt"),
    "config is no text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is corrupt"),
    "tensors cut": (_tensors(lambda data: data[:-7]), r"its tensors end at byte \d+, and the file has"),
    "tensors longer": (_tensors(lambda data: data + b"0"), r"its tensors end at byte \d+, and the file has"),
    "cut inside the header": (_tensors(lambda data: data[:1000]), r"its header would have \d+ bytes"),
    "tensors empty": (_tensors(lambda data: b""), r"model\.safetensors is corrupt"),
    "header beyond the file": (
        _tensors(lambda data: (1 << 40).to_bytes(8, "little") + data[8:]),
        r"its header would have 1099511627776 bytes",
    ),
    "header is no JSON": (
        _tensors(lambda data: data[:8] + b"x" + data[9:]),
        r"its header is no list of tensors",
    ),
    "a tensor is missing": (
        _without("model.layers.1.mlp.up_proj.weight_codes"),
        r"do not hold the tensors that .*config\.json was written for",
    ),
    "a 16-bit tensor is missing": (_without("model.norm.weight"), r"do not hold the tensors"),
    "newer version": (
        _config(lambda e: e.update(schema_version=4)),
        r"has schema version 4, and this release reads 3: install a newer mixq-compile",
    ),
    "no version": (_config(lambda e: e.pop("schema_version")), r"has schema version None"),
    "another method": (
        _config(lambda e: e.update(quant_method="gptq")),
        r"has quant_method 'gptq', not 'mixq': it was quantized by another library",
    ),
    "other scheme version": (
        _config(lambda e: e["schemes"]["w8a8o16"].update(version=9)),
        r"config\.json is corrupt .*schema version 9",
    ),
    "another recipe": (
        _config(lambda e: _first_linear(e).update(recipe="weight=int4 absmax; activation=int8")),
        r"config\.json is corrupt .*its recipe is 'weight=int4",
    ),
    "unknown dtype": (_config(lambda e: e.update(dtype="float17")), r"config\.json is corrupt .*float17"),
    "a field is missing": (
        _config(lambda e: _first_linear(e).pop("shape")),
        r"config\.json is corrupt .*down_proj' lacks 'shape'",
    ),
    "more columns than slots": (
        _config(lambda e: _first_linear(e).update(columns=4096)),
        r"config\.json is corrupt .*4096 outlier columns",
    ),
    "a linear of another shape": (
        _config(lambda e: _first_linear(e).update(shape=[64, 32])),
        r"the model's 'model\.layers\.0\.mlp\.down_proj' is a Linear of \(64, 128\)",
    ),
    "a linear that is not quantized": (
        _config(lambda e: e["modules"].popitem()),
        r"the files hold codes of 'model\.layers\.1\.self_attn\.v_proj', and config\.json does not say",
    ),
    "another vocabulary": (
        lambda d: (d / "config.json").write_text(
            (d / "config.json").read_text().replace('"vocab_size": 96', '"vocab_size": 90')
        ),
        r"has shape \[96, 64\] in .*model\.safetensors, and the model that config\.json describes \[90, 64\]",
    ),
    "all are of another model": (
        _config(lambda e: e.update(modules={f"other.{n}": m for n, m in e["modules"].items()})),
        r"none of the 14 quantized linears",
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


def test_an_unknown_architecture(directory: Path, tmp_path: Path) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(CheckpointError, match=r"this transformers \(.*\) has no 'NoSuchModel'"):
        mixq.load_pretrained(tmp_path)


def test_a_changed_byte_is_found_by_its_hash(directory: Path, tmp_path: Path) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    mixq.load_pretrained(tmp_path, verify=True)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-100] ^= 4
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has other bytes than were written"):
        mixq.load_pretrained(tmp_path, verify=True)


def test_a_directory_that_is_none() -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json: it is no quantized directory"):
        mixq.load_pretrained("/no/such/directory")


def test_statistics_of_a_part_are_those_of_the_whole(tmp_path: Path) -> None:
    """A saved model keeps which columns were calibrated, not the statistics themselves."""
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES))
    mixq.quantize(model, stats=statistics({"0": {3: 9.0}}), miss="static", threshold=6.0)
    assert model[0].calibrated == ((3, 9.0),)
