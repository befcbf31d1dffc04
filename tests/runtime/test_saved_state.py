"""What a swapped model is survives saving, copying and loading, or loading says what does not fit."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import block, compiled, rows
from old_directory import save_old
from tiny_llama import ids, logits, tiny_llama, transformers
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.errors import CheckpointError
from mixq_compile.runtime.mixq_linear import MixqLinear


def four_bits(factor: float = 1.0) -> Any:
    """A model whose outlier columns are inexact unless they come from the 16-bit weights."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.mul_(factor)
    return mixq.quantize(model, "w4a8o16", keep_originals=True)


def linears(model: nn.Module) -> list[MixqLinear]:
    return [module for module in model.modules() if isinstance(module, MixqLinear)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _through_a_directory(model: Any, folder: Path) -> Any:
    return mixq.load_pretrained(mixq.save_pretrained(model, folder))


def _through_its_own_method(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return mixq.load_pretrained(folder)


def _through_a_state(model: Any, _: Path) -> Any:
    other = four_bits(1.5)
    other.load_state_dict(model.state_dict())
    return other


def _through_a_file_of_its_state(model: Any, folder: Path) -> Any:
    from safetensors.torch import load_model, save_model

    save_model(model, str(folder / "state.safetensors"))
    other = four_bits(1.5)
    load_model(other, folder / "state.safetensors")
    return other


def _through_an_assigned_state(model: Any, _: Path) -> Any:
    other = four_bits(1.5)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return other


def _through_torch_save(model: Any, _: Path) -> Any:
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    return torch.load(written, weights_only=False)


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "save_pretrained": _through_a_directory,
    "its own save_pretrained": _through_its_own_method,
    "a directory, twice": lambda m, d: _through_a_directory(_through_a_directory(m, d / "1"), d / "2"),
    "state_dict": _through_a_state,
    "assign": _through_an_assigned_state,
    "save_model": _through_a_file_of_its_state,
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": _through_torch_save,
}


@pytest.mark.parametrize("way", WAYS)
def test_originals_survive(way: str, tmp_path: Path) -> None:
    """The columns are found after the way: their weights come from what survived."""
    reference = tiny_llama()
    model = four_bits()
    found = WAYS[way](model, tmp_path)
    expected = logits(model, ids(4, 12))
    assert torch.equal(logits(found, ids(4, 12)), expected)
    assert relative_error(expected, logits(reference, ids(4, 12))) < 0.012, "else nothing is tested here"
    assert {module.outlier_weight_source for module in linears(found)} == {"original"}
    report = mixq.report(found)
    assert len(report.quantized) == 14
    assert {linear.outlier_weight_source for linear in report.quantized} == {"original"}
    assert all(linear.float_weight_kept for linear in report.quantized)


def test_originals_keep_the_dtype_that_the_model_has(tmp_path: Path) -> None:
    model = mixq.quantize(tiny_llama().bfloat16(), "w4a8o16", keep_originals=True)
    loaded = _through_a_directory(model, tmp_path)
    assert {module.outlier_source.dtype for module in linears(loaded)} == {torch.bfloat16}
    assert torch.equal(logits(loaded.to(torch.float32), ids()), logits(model.float(), ids()))
    assert {module.outlier_source.dtype for module in linears(loaded)} == {torch.float32}


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_with_originals_and_a_model_without_are_no_equals(strict: bool) -> None:
    keeping, freeing = mixq.quantize(block(), keep_originals=True), mixq.quantize(block())
    with pytest.raises(RuntimeError, match="kept the 16-bit weight in the saved model and not in this one"):
        freeing.load_state_dict(keeping.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match="kept the 16-bit weight in this model and not in the saved one"):
        keeping.load_state_dict(freeing.state_dict(), strict=strict)


def test_a_module_loads_what_it_saved_and_a_state_from_before_tripwires() -> None:
    model, other = mixq.quantize(block()), mixq.quantize(block())
    model(rows(columns=(3,)))
    assert other.load_state_dict(model.state_dict()) == ([], [])
    older = {name: value for name, value in model.state_dict().items() if not name.endswith("_proj.weight")}
    assert mixq.quantize(block()).load_state_dict(older) == ([], [])
    assert torch.equal(other(rows()), model(rows()))


SETTINGS: dict[str, tuple[dict[str, Any], Callable[[MixqLinear], object]]] = {
    "scheme": ({"scheme": "w8a16"}, lambda m: m.scheme),
    "threshold": ({"threshold": 3.0}, lambda m: (m.scheme.outliers, m.recipe)),
    "capacity": ({"capacity": 32}, lambda m: m.outlier_state().capacity),
    "miss policy": ({"miss": "lazy"}, lambda m: m.recipe),
    "batch_invariant": ({"batch_invariant": True}, lambda m: (m.batch_invariant, m.recipe)),
    "calibrated": ({"miss": "static", "stats": True}, lambda m: m.calibrated),
    "frozen": ({"miss": "frozen", "freeze": True}, lambda m: int(m.counters[3])),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("way", ["save_pretrained", "deepcopy", "pickle", "torch.save"])
def test_settings_survive(setting: str, way: str, tmp_path: Path) -> None:
    options, read = SETTINGS[setting]
    options = dict(options)
    model, freezes = tiny_llama(), options.pop("freeze", False)
    if options.pop("stats", False):
        options["stats"] = mixq.calibrate(model, [ids(4, 12)])
    mixq.quantize(model, **options)
    if freezes:
        logits(model, ids())
        mixq.freeze(model)
    found = WAYS[way](model, tmp_path)
    assert [read(module) for module in linears(found)] == [read(module) for module in linears(model)]
    assert {read(module) for module in linears(found)} != {read(linears(mixq.quantize(tiny_llama()))[0])}
    assert torch.equal(logits(found, ids(seed=5)), logits(model, ids(seed=5)))


def test_the_report_of_a_loaded_model_is_that_of_the_saved_one(tmp_path: Path) -> None:
    model = mixq.quantize(tiny_llama(), ignore=["down_proj", "lm_head"])
    before = {linear.fqn: (linear.scheme, linear.skip, linear.role) for linear in mixq.report(model).linears}
    loaded = _through_a_directory(model, tmp_path)
    assert {li.fqn: (li.scheme, li.skip, li.role) for li in mixq.report(loaded).linears} == before
    assert len(before) == 15
    again = _through_a_directory(loaded, tmp_path / "again")
    assert len(mixq.report(again).skipped) == 3


def test_the_report_of_a_copy_lists_what_is_quantized() -> None:
    model = mixq.quantize(block())
    for found in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [linear.fqn for linear in mixq.report(found).quantized] == ["up_proj", "down_proj"]


class TestCompiledModels:
    def test_a_compiled_wrapper_is_saved_as_the_model_in_it(self, tmp_path: Path) -> None:
        model = mixq.quantize(tiny_llama())
        for number, save in enumerate((mixq.save_pretrained, lambda m, d: m.save_pretrained(d))):
            save(compiled(model), tmp_path / str(number))
            loaded = mixq.load_pretrained(tmp_path / str(number))
            assert type(loaded).__name__ == "LlamaForCausalLM"
            assert torch.equal(logits(loaded, ids()), logits(model, ids()))

    def test_layers_that_were_compiled_one_by_one(self, tmp_path: Path) -> None:
        model = mixq.quantize(tiny_llama())
        expected = logits(model, ids())
        for place, layer in enumerate(model.model.layers):
            model.model.layers[place] = compiled(layer)
        loaded = _through_a_directory(model, tmp_path)
        assert torch.equal(logits(loaded, ids()), expected)


class TestInterruptedSaving:
    @pytest.mark.parametrize("name", ["save_file", "generation"])
    def test_a_new_directory_is_gone(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = mixq.quantize(tiny_llama())
        _fail(monkeypatch, model, name)
        with pytest.raises(CheckpointError, match=r"new cannot be written .*No space left"):
            mixq.save_pretrained(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_an_old_directory_stays_as_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = mixq.quantize(tiny_llama())
        expected = logits(_through_a_directory(model, tmp_path), ids())
        logits(model, ids(seed=9))
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        _fail(monkeypatch, model, "save_file")
        with pytest.raises(CheckpointError, match="No space left"):
            mixq.save_pretrained(model, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
        assert torch.equal(logits(mixq.load_pretrained(tmp_path), ids()), expected)

    def test_a_directory_that_was_cut_off_while_files_are_moved_has_no_config(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mixq_compile.runtime import checkpoint_saving

        model = mixq.quantize(tiny_llama())
        mixq.save_pretrained(model, tmp_path)
        order: list[str] = []

        def move(source: Path, target: Path) -> None:
            order.append(target.name)
            if len(order) == 2:
                raise KeyboardInterrupt
            source.rename(target)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_saving.os, "replace", move)
            with pytest.raises(KeyboardInterrupt):
                mixq.save_pretrained(model, tmp_path)
        assert not (tmp_path / "config.json").exists()
        with pytest.raises(CheckpointError, match=r"holds no config\.json: .* whose writing was interrupted"):
            mixq.load_pretrained(tmp_path)
        mixq.save_pretrained(model, tmp_path)
        assert torch.equal(logits(mixq.load_pretrained(tmp_path), ids()), logits(model, ids()))
        assert not list(tmp_path.glob(".mixq-*"))

    def test_the_config_comes_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from mixq_compile.runtime import checkpoint_saving

        order: list[str] = []
        replace = checkpoint_saving.os.replace
        monkeypatch.setattr(
            checkpoint_saving.os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b))[1]
        )
        mixq.save_pretrained(mixq.quantize(tiny_llama()), tmp_path, max_shard_size="60KB")
        assert order[-2:] == ["model.safetensors.index.json", "config.json"]
        assert "model-00001-of-00003.safetensors" in order[:-2]


def _fail(monkeypatch: pytest.MonkeyPatch, model: Any, name: str) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    if name == "save_file":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    else:
        monkeypatch.setattr(model.generation_config, "save_pretrained", full)


def test_generation_settings_of_an_older_save_do_not_stay(tmp_path: Path) -> None:
    model = mixq.quantize(tiny_llama())
    model.generation_config.max_new_tokens = 17
    mixq.save_pretrained(model, tmp_path)
    model.generation_config = None
    assert mixq.load_pretrained(mixq.save_pretrained(model, tmp_path)).generation_config.max_new_tokens != 17


@pytest.mark.parametrize("schema", [1, 2])
class TestDirectoriesOfOlderReleases:
    def test_load_and_are_said_to_be_old(self, schema: int, tmp_path: Path) -> None:
        model = mixq.quantize(tiny_llama())
        logits(model, ids())
        save_old(model, tmp_path, schema)
        with pytest.warns(UserWarning, match=r"was written by an older release \(it has a mixq\.json\)"):
            loaded = mixq.load_pretrained(tmp_path)
        assert torch.equal(logits(loaded, ids(seed=3)), logits(model, ids(seed=3)))

    def test_are_written_again_in_todays_format(self, schema: int, tmp_path: Path) -> None:
        save_old(mixq.quantize(tiny_llama()), tmp_path, schema)
        with pytest.warns(UserWarning, match="older release"):
            loaded = mixq.load_pretrained(tmp_path)
        loaded.save_pretrained(tmp_path)
        assert not (tmp_path / "mixq.json").exists()
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(again, ids()), logits(loaded, ids()))

    def test_transformers_says_who_reads_them(self, schema: int, tmp_path: Path) -> None:
        save_old(mixq.quantize(tiny_llama()), tmp_path, schema)
        if schema == 2:  # The first one says nothing of quantization in config.json.
            with pytest.raises(
                CheckpointError, match=r"load it with mixq_compile\.load_pretrained, and save it"
            ):
                transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema_version": 7}, "has schema version 7"),
            ({"linears": {"model.nowhere": {}}}, r"mixq\.json is corrupt"),
            ({"architecture": "NoSuchModel"}, "has no 'NoSuchModel'"),
        ],
        ids=["version", "linears", "architecture"],
    )
    def test_damaged_ones_name_the_file(
        self, schema: int, change: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        save_old(mixq.quantize(tiny_llama()), tmp_path, schema)
        manifest = json.loads((tmp_path / "mixq.json").read_text())
        (tmp_path / "mixq.json").write_text(json.dumps({**manifest, **change}))
        with (
            pytest.warns(UserWarning, match="older release"),
            pytest.raises(CheckpointError, match=message),
        ):
            mixq.load_pretrained(tmp_path)
