"""Files changed at random: a CheckpointError each, or the model that was saved; never another one."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import ids, logits, tiny_llama

import mixq_compile as mixq
from mixq_compile.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    model = mixq.quantize(tiny_llama())
    logits(model, ids(seed=2))
    path = tmp_path_factory.mktemp("saved")
    mixq.save_pretrained(model, path, max_shard_size="60KB")
    (path / "README.md").unlink()  # Nothing reads it.
    return path, logits(model, ids())


def mutate(directory: Path, seed: int) -> str:
    """Changes one file; returns what was done."""
    chance = random.Random(seed)
    path = chance.choice(sorted(directory.iterdir()))
    data = bytearray(path.read_bytes())
    kind = chance.choice(["flip", "cut", "append", "zero", "swap", "delete", "header", "repeat"])
    place = chance.randrange(len(data))
    if kind == "flip":
        data[place] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "append":
        data += bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
    elif kind == "zero":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    elif kind == "swap":
        other = chance.choice([each for each in sorted(directory.iterdir()) if each != path])
        data = bytearray(other.read_bytes())
    elif kind == "header":
        data[:8] = chance.randrange(1 << chance.randrange(1, 64)).to_bytes(8, "little")
    elif kind == "repeat":
        data[place:place] = data[place : place + 32]
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{kind} of {path.name} at {place}"


def outcome(directory: Path, expected: Any, what: str) -> str:
    """`refused: …` or `same`; fails for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = mixq.load_pretrained(directory, verify=True)
    except CheckpointError as error:
        return f"refused: {error}"
    found = logits(model, ids())
    assert torch.equal(found, expected), f"{what}: another model was loaded"
    return "same"


def run(saved: tuple[Path, Any], folder: Path, seeds: range) -> dict[str, int]:
    counts = {"refused": 0, "same": 0}
    for seed in seeds:
        copied = folder / str(seed)
        shutil.copytree(saved[0], copied)
        what = mutate(copied, seed)
        came = outcome(copied, saved[1], f"seed {seed}, {what}")
        assert came == "same" or str(copied) in came, f"{what}: the error names no file: {came}"
        counts[came.partition(":")[0]] += 1
        shutil.rmtree(copied)
    return counts


def test_thirty_mutations(saved: tuple[Path, Any], tmp_path: Path) -> None:
    counts = run(saved, tmp_path, range(30))
    # Some change nothing that matters: a blank, generation settings, a field of config.json with a default.
    assert counts["refused"] >= 15, counts


@pytest.mark.parametrize(
    ("field", "value"),
    [("rms_norm_eps", 0.5), ("hidden_act", "relu"), ("rope_parameters", {"rope_theta": 7.0})],
)
def test_a_changed_setting_of_the_model_is_found(
    field: str, value: Any, saved: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(saved[0], tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=r"config\.json has other bytes than were written"):
        mixq.load_pretrained(tmp_path / "copy", verify=True)


@pytest.mark.slow
def test_two_hundred_mutations(saved: tuple[Path, Any], tmp_path: Path) -> None:
    counts = run(saved, tmp_path, range(1000, 1200))
    print(counts)
    assert counts["refused"] >= 100, counts
