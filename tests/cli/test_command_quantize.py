"""`mixq quantize` of a directory: what it says, what it writes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from commands import mixq, mixq_json

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    model, tokenizer = tiny_models.llama()
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_dry_run_says_sizes_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    found = mixq_json("quantize", source, "--output", tmp_path / "q", "--dry-run")
    assert not (tmp_path / "q").exists()
    written = mixq_json("quantize", source, "--output", tmp_path / "q")
    assert found["written"] is False
    assert written["written"] is True
    assert {**found, **written} == {**found, **written, "bytes_after": found["bytes_after"]}
    assert found["quantized"] == written["quantized"]
    files = sum(path.stat().st_size for path in (tmp_path / "q").glob("*.safetensors"))
    assert found["bytes_after"] == written["bytes_after"] == files
    assert set(written["relative_errors"]) == set(written["quantized"])
    assert all(0 < error < 0.02 for error in written["relative_errors"].values())


def test_the_dtype_and_the_tokenizer_are_the_sources(source: Path, tmp_path: Path) -> None:
    shown = mixq("quantize", source, "--output", tmp_path / "q").stdout
    assert "w8a8o16" in shown
    assert "ignored: its name matches 'lm_head'" in shown
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert model.dtype == torch.bfloat16
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "q")) == tiny_models.VOCABULARY


def test_verify_compares_what_is_there(source: Path, tmp_path: Path) -> None:
    arguments = ("quantize", source, "--output", tmp_path / "q")
    mixq(*arguments)
    assert "holds the bytes that were written" in mixq(*arguments, "--verify").stdout
    path = tmp_path / "q" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert "has other bytes than were written" in mixq(*arguments, "--verify", code=1).stderr
    assert "has files in it" in mixq(*arguments, code=2).stderr
    mixq(*arguments, "--overwrite")
    mixq(*arguments, "--verify")


def test_options_that_need_a_directory_are_refused_elsewhere(source: Path, tmp_path: Path) -> None:
    for flag in ("--dry-run", "--verify"):
        for arguments in (("tiny_models:llama",), (source, "--dtype", "float32")):
            message = mixq("quantize", *arguments, "--output", tmp_path / "q", flag, code=2).stderr
            assert "are for a directory with safetensors files" in message


def test_a_dtype_loads_the_model_first(source: Path, tmp_path: Path) -> None:
    mixq("quantize", source, "--output", tmp_path / "q", "--dtype", "float32")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q").dtype == torch.float32


def test_nothing_to_quantize_writes_nothing(source: Path, tmp_path: Path) -> None:
    arguments = ("quantize", source, "--output", tmp_path / "q", "--ignore", "*")
    assert "none of the linears" in mixq(*arguments, code=1).stderr
    assert not (tmp_path / "q").exists()


def test_four_bits_ask_for_statistics(source: Path, tmp_path: Path) -> None:
    arguments = ("quantize", source, "--output", tmp_path / "q", "--scheme", "w4a8o16")
    assert "run mixq calibrate" in mixq(*arguments, code=2).stderr
