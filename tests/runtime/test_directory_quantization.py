"""From file to file: the bits of `quantize`, whole files or none, and an error for whatever is amiss."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import ids, logits, tiny_llama, transformers
from torch import nn

import mixq_compile as mixq
from mixq_compile.checkpoints import file_quantization
from mixq_compile.checkpoints.directory import checked_tensors
from mixq_compile.checkpoints.journal import JOURNAL
from mixq_compile.errors import CheckpointError, OptionError
from mixq_compile.runtime.directory_plan import DirectoryPlan, plan_directory
from mixq_compile.runtime.directory_quantization import DirectoryQuantization, clear
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.options import MixqOptions

CPU = torch.device("cpu")
SHARD = 40_000


def plan(source: Path, **options: Any) -> DirectoryPlan:
    return plan_directory(source, MixqOptions.from_user(options={"force": True, **options}), CPU)


def quantized(
    source: Path,
    output: Path,
    progress: Callable[..., None] = lambda *_: None,
    verify: bool = False,
    **options: Any,
) -> Path:
    """The directory that `mixq quantize` writes, in several files."""
    making = DirectoryQuantization(plan(source, **options), output, SHARD)
    making.run(device=CPU, progress=progress, verify=verify)
    return output


def written(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 32-bit directory of several shards, to be read only."""
    path = tmp_path_factory.mktemp("source")
    tiny_llama().save_pretrained(path, max_shard_size="100KB")
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_text("no")
    return path


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes, to be read only."""
    return quantized(source, tmp_path_factory.mktemp("whole") / "model")


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return tiny_llama(**changes).to(dtype)


def gpt2(**_: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)


def with_biases() -> Any:
    model = llama(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "fp32": (llama, {}),
    "bfloat16": (lambda: llama(torch.bfloat16), {}),
    "float16": (lambda: llama(torch.float16), {"scheme": "w8a8"}),
    "by layer": (llama, {"layers": {"*.down_proj": "w8a16"}, "ignore": ("lm_head", "*.o_proj")}),
    "invariant": (llama, {"batch_invariant": True, "threshold": 3.0, "capacity": 32}),
    "biases": (with_biases, {}),
    "tied": (lambda: llama(tie_word_embeddings=True), {"ignore": ()}),
    "Conv1D": (gpt2, {}),
    "odd sizes": (lambda: llama(intermediate_size=100), {"scheme": "w8a8"}),
}


def linears(model: nn.Module) -> Iterator[tuple[str, MixqLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MixqLinear))


@pytest.mark.parametrize("case", CASES)
def test_gives_what_quantize_gives(case: str, tmp_path: Path) -> None:
    build, options = CASES[case]
    build().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    loaded = mixq.load_pretrained(quantized(tmp_path / "source", tmp_path / "output", **options), verify=True)
    # A model that was loaded, because loading computes some buffers in fp32 where `.to` casts them.
    expected = mixq.quantize(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source"), **options
    )
    found = dict(linears(loaded))
    assert found.keys() == dict(linears(expected)).keys()
    for name, module in linears(expected):
        assert torch.equal(module.weight_codes, found[name].weight_codes), name
        assert torch.equal(module.weight_scale, found[name].weight_scale), name
    assert loaded.dtype == expected.dtype
    assert torch.equal(logits(loaded, ids()), logits(expected, ids()))
    skipped = {linear.fqn: linear.skip for linear in mixq.report(expected).skipped}
    assert {linear.fqn: linear.skip for linear in mixq.report(loaded).skipped} == skipped


@pytest.mark.parametrize(
    ("scheme", "miss"),
    [("w4a8o16", "static"), ("w4a4o16", "static"), ("auto8", "exact"), ("auto8", "static"), ("auto4", None)],
)
def test_calibrated_columns_and_searched_scales(
    scheme: str, miss: str | None, source: Path, tmp_path: Path
) -> None:
    stats = mixq.calibrate(tiny_llama(), [ids(4, 12)], kinds=("gram",))
    options = {"scheme": scheme, "stats": stats, "miss": miss, "threshold": 3.0}
    loaded = mixq.load_pretrained(quantized(source, tmp_path / "output", **options))
    expected = mixq.quantize(tiny_llama(), **options)
    assert any(module.calibrated for _, module in linears(loaded))
    assert torch.equal(logits(loaded, ids()), logits(expected, ids()))
    mixq.reset(loaded)
    assert torch.equal(logits(loaded, ids()), logits(expected, ids())), "a reset forgot calibrated columns"


def test_blocks_of_rows_give_the_bytes_of_a_whole_matrix(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_quantization, "BLOCK_ELEMENTS", 7 * 64)
    monkeypatch.setattr(file_quantization, "COPY_BYTES", 1000)
    assert written(quantized(source, tmp_path / "model")) == written(whole)


def test_what_is_not_finite_becomes_what_the_specification_says(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "source")
    loaded = mixq.load_pretrained(quantized(tmp_path / "source", tmp_path / "output"))
    expected = mixq.quantize(model)
    scales = [each.model.layers[1].mlp.up_proj.weight_scale for each in (loaded, expected)]
    assert scales[0][3].isnan()
    assert torch.equal(scales[0].view(torch.int32), scales[1].view(torch.int32))


def test_other_files_come_along_but_no_other_weights(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"config.json", "README.md", "tokenizer.json", "generation_config.json"} < names
    assert "pytorch_model.bin" not in names
    assert JOURNAL not in names


def test_tensors_begin_at_multiples_of_their_size(whole: Path) -> None:
    for name, entry in checked_tensors(whole).items():
        assert entry.begin % entry.torch_dtype.itemsize == 0, name


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval().requires_grad_(False)


def test_experts_stay_in_16_bit_and_are_told(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "source")
    assert any(".experts.0.w1.weight" in name for name in checked_tensors(tmp_path / "source"))
    made = plan(tmp_path / "source")
    assert made.quantization.left_alone["model.layers.0.mlp.experts.gate_up_proj"].skip.startswith(
        "unsupported"
    )
    loaded = mixq.load_pretrained(quantized(tmp_path / "source", tmp_path / "output"))
    expected = mixq.quantize(mixtral())
    assert len(dict(linears(loaded))) == len(dict(linears(expected))) == 8
    assert torch.equal(logits(loaded, ids()), logits(expected, ids()))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(mixq.load_pretrained(tmp_path / "again"), ids()), logits(expected, ids()))


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def stopped_at(call: int) -> Callable[..., None]:
    calls = iter(range(10**9))

    def progress(*_: Any) -> None:
        if next(calls) == call:
            raise Stopped

    return progress


class TestGoingOn:
    @pytest.mark.parametrize("call", [0, 3, 9, 14, 22, 29])
    def test_gives_the_bytes_of_an_uninterrupted_run(
        self, call: int, source: Path, whole: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(Stopped):
            quantized(source, tmp_path / "model", stopped_at(call))
        assert not (tmp_path / "model" / "config.json").exists()
        with pytest.raises(CheckpointError, match="whose writing was interrupted"):
            mixq.load_pretrained(tmp_path / "model")
        assert written(quantized(source, tmp_path / "model")) == written(whole)

    def test_does_not_write_whole_files_again(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(Stopped):
            quantized(source, tmp_path / "model", stopped_at(20))
        first = (
            tmp_path
            / "model"
            / next(n for n in os.listdir(tmp_path / "model") if n.startswith("model-00001"))
        )
        before = first.stat().st_mtime_ns
        quantized(source, tmp_path / "model")
        assert first.stat().st_mtime_ns == before

    @pytest.mark.parametrize(
        "torn", [b'{"file": "model-0', b'{"file": "model-00002-of-00005.safetensors"}', b"\xff\n"]
    )
    def test_drops_a_torn_line(self, torn: bytes, source: Path, whole: Path, tmp_path: Path) -> None:
        with pytest.raises(Stopped):
            quantized(source, tmp_path / "model", stopped_at(20))
        with open(tmp_path / "model" / JOURNAL, "ab") as journal:
            journal.write(torn)
        assert written(quantized(source, tmp_path / "model")) == written(whole)

    def test_makes_a_file_anew_that_has_lost_bytes(self, source: Path, whole: Path, tmp_path: Path) -> None:
        with pytest.raises(Stopped):
            quantized(source, tmp_path / "model", stopped_at(20))
        first = next((tmp_path / "model").glob("model-00001-of-*"))
        first.write_bytes(first.read_bytes()[:-1])
        assert written(quantized(source, tmp_path / "model")) == written(whole)

    def test_finds_changed_bytes_with_verify(self, source: Path, whole: Path, tmp_path: Path) -> None:
        with pytest.raises(Stopped):
            quantized(source, tmp_path / "model", stopped_at(20))
        first = next((tmp_path / "model").glob("model-00001-of-*"))
        first.write_bytes(first.read_bytes()[:-1] + b"\x7f")
        assert written(quantized(source, tmp_path / "model", verify=True)) == written(whole)

    @pytest.mark.parametrize(
        "options", [{"scheme": "w8a8"}, {"ignore": ("lm_head", "*.o_proj")}, {"threshold": 5.0}]
    )
    def test_refuses_other_options(self, options: dict[str, Any], source: Path, tmp_path: Path) -> None:
        with pytest.raises(Stopped):
            quantized(source, tmp_path / "model", stopped_at(20))
        with pytest.raises(OptionError, match=r"was begun with other options or from other files \(plan"):
            quantized(source, tmp_path / "model", **options)
        clear(tmp_path / "model")
        quantized(source, tmp_path / "model", **options)

    def test_refuses_other_files(self, source: Path, tmp_path: Path) -> None:
        copied = tmp_path / "source"
        copied.mkdir()
        for path in source.iterdir():
            (copied / path.name).write_bytes(path.read_bytes())
        with pytest.raises(Stopped):
            quantized(copied, tmp_path / "model", stopped_at(20))
        shard = next(copied.glob("model-00001-of-*"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
        os.utime(shard, ns=(1, 1))
        with pytest.raises(OptionError, match=r"from other files \(source differ\)"):
            quantized(copied, tmp_path / "model")


class TestDisks:
    def test_a_full_one_is_seen_before_work(self, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match=r"needs 0\.07 GB more, and its disk has 0\.00 GB free"):
            quantized(source, tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_one_that_fills_up_meanwhile_leaves_no_part(
        self, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        allocate, calls = os.posix_fallocate, iter(range(99))

        def full(descriptor: int, offset: int, length: int) -> None:
            if next(calls) == 2:
                raise OSError(28, "No space left on device")
            allocate(descriptor, offset, length)

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(
                CheckpointError, match=r"model-00003-of-\d+\.safetensors needs .*\(No space left"
            ):
                quantized(source, tmp_path / "model")
        assert not (tmp_path / "model" / "config.json").exists()
        assert not list((tmp_path / "model").glob("*.unfinished"))
        assert written(quantized(source, tmp_path / "model")) == written(whole)


def _without(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        save_file(
            {key: each for key, each in tensors.items() if key != name}, path, metadata={"format": "pt"}
        )

    return damage


def _config(**changes: Any) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def _data(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda d: (d / "model.safetensors").write_bytes(change((d / "model.safetensors").read_bytes()))


DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), CheckpointError, r"config\.json cannot be read"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), CheckpointError, "holds neither"),
    "cut": (_data(lambda data: data[:-5]), CheckpointError, "its tensors end at byte"),
    "header beyond the file": (
        _data(lambda data: b"\xff" * 8 + data[8:]), CheckpointError, "its header would have",
    ),
    "a weight is missing": (
        _without("model.layers.1.mlp.up_proj.weight"), CheckpointError,
        r"hold no weight of 'model\.layers\.1\.mlp\.up_proj'",
    ),
    "another width": (_config(intermediate_size=96), CheckpointError, "has shape .* of different models"),
    "unknown architecture": (_config(architectures=["NoSuch"]), OptionError, "is a NoSuch, which this"),
    "quantized already": (
        _config(quantization_config={"quant_method": "gptq"}), OptionError, r"is quantized already \(gptq\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_sources_that_are_amiss(case: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "source")
    damage, kind, message = DAMAGE[case]
    damage(tmp_path / "source")
    with pytest.raises(kind, match=message):
        quantized(tmp_path / "source", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_shard_that_is_cut_off_while_it_is_read(source: Path, tmp_path: Path) -> None:
    copied = tmp_path / "source"
    copied.mkdir()
    for path in source.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    making = DirectoryQuantization(plan(copied), tmp_path / "output", SHARD)
    shard = sorted(copied.glob("model-*-of-*"))[-1]
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"ends at byte \d+, and its header promises"):
        making.run(device=CPU, progress=lambda *_: None)
    assert not (tmp_path / "output" / "config.json").exists()
