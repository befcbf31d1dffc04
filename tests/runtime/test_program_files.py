"""`mixq.save` and `mixq.load`: a compiled program in a file, read by a process that imported nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import FEATURES, rows
from torch import nn
from torch.export import Dim

import mixq_compile as mixq
from mixq_compile.errors import CheckpointError, OptionError

ROOT = Path(mixq.__file__).parents[1]
READS = """
import sys, torch
sys.path.insert(0, {root!r})
import mixq_compile as mixq
module = mixq.load({path!r}).module()
for ids in torch.load({inputs!r}):
    print(module(input_ids=ids, use_cache=False).logits.double().sum().item())
"""


@pytest.fixture(scope="module")
def language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def saved(language_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A causal model with dynamic batch and length, compiled and saved; and the program itself."""
    example = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "use_cache": False}
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "use_cache": None}
    program, _ = mixq.compile(mixq.capture(language_model, example, dynamic_shapes=shapes), force=True)
    path = tmp_path_factory.mktemp("programs") / "model.pt2"
    mixq.save(program, path)
    return path, program


def test_a_fresh_process_runs_a_model_of_transformers_at_other_sizes(saved, tmp_path):
    path, program = saved
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randint(96, size, generator=generator) for size in ((2, 8), (3, 5), (5, 17))]
    torch.save(inputs, tmp_path / "inputs.pt")
    script = READS.format(root=str(ROOT), path=str(path), inputs=str(tmp_path / "inputs.pt"))
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    module = program.module()
    expected = [module(input_ids=ids, use_cache=False).logits.double().sum().item() for ids in inputs]
    assert [float(line) for line in ran.stdout.split()] == pytest.approx(expected, rel=1e-5)


def test_the_file_holds_each_weight_once(saved):
    path, program = saved
    held = sum(tensor.nbytes for tensor in program.state_dict.values())
    with zipfile.ZipFile(path) as archive:
        sizes = [entry.file_size for entry in archive.infolist() if "/data/weights/weight_" in entry.filename]
    assert sum(sizes) <= 1.05 * held


def block() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES)).eval().requires_grad_(False)
    return mixq.compile(mixq.capture(model, (rows(),)), force=True)[0]


def test_a_file_of_torch_export_save_is_read_too(tmp_path):
    program = block()
    torch.export.save(program, tmp_path / "block.pt2")
    assert torch.equal(mixq.load(tmp_path / "block.pt2").module()(rows()), program.module()(rows()))


def test_the_schema_is_checked_before_anything_is_read(tmp_path):
    mixq.save(block(), tmp_path / "block.pt2")
    with zipfile.ZipFile(tmp_path / "block.pt2") as old, zipfile.ZipFile(tmp_path / "new.pt2", "w") as new:
        for name in old.namelist():
            later = json.dumps({"schema": 2, "mixq_compile": "9.0"})
            new.writestr(name, later if name.endswith("mixq.json") else b"spoilt")
    with pytest.raises(CheckpointError, match=r"schema version 2, written by mixq-compile 9\.0"):
        mixq.load(tmp_path / "new.pt2")


def test_what_is_no_program_is_told(tmp_path):
    (tmp_path / "text.pt2").write_text("text")
    with pytest.raises(CheckpointError, match="is no exported program"):
        mixq.load(tmp_path / "text.pt2")
    with pytest.raises(CheckpointError, match="there is no file"):
        mixq.load(tmp_path / "absent.pt2")
    with pytest.raises(OptionError, match="save takes an exported program"):
        mixq.save(nn.Linear(2, 2), tmp_path / "linear.pt2")


def test_a_save_that_fails_leaves_the_file_before_it(tmp_path, monkeypatch):
    mixq.save(block(), tmp_path / "block.pt2")
    before = (tmp_path / "block.pt2").read_bytes()

    def full(program: Any, file: Any, **others: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="No space left"):
        mixq.save(block(), tmp_path / "block.pt2")
    assert (tmp_path / "block.pt2").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["block.pt2"]
