"""`mixq tune`, its shapes, and the tables that it and the package keep."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from commands import mixq, mixq_json

from mixq_compile.cli import tune as command
from mixq_compile.formats import INT8
from mixq_compile.kernels.tl import measured, speed_table, tuning
from mixq_compile.kernels.tl.speed_table import SpeedTable, cache_file, interpolate, save, shipped, tuned
from mixq_compile.ops.providers import KernelQuery

GPU = torch.device("cuda")
OTHER = "NVIDIA Imaginary 1"
LINEAR = KernelQuery("mixed_linear", GPU, torch.bfloat16, INT8, INT8, 4096, 11008)
SHAPE = (8, 11008, 4096)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(speed_table.CACHE_VARIABLE, str(tmp_path))
    tuned.cache_clear()
    yield tmp_path
    tuned.cache_clear()


@pytest.fixture
def other_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU without a shipped table, whose measurements take no GPU; returns the rows measured."""
    rows: list[int] = []
    monkeypatch.setattr(measured, "device_name", lambda device: OTHER)
    monkeypatch.setattr(tuning, "can_measure", lambda query: True)
    monkeypatch.setattr(tuning, "measure", lambda query, count: rows.append(count) or 1.5)
    return rows


def test_a_table_survives_its_file() -> None:
    table = SpeedTable(OTHER)
    table.add(SHAPE, 16, 1.25)
    table.add(SHAPE, 1024, 1.75)
    save(table)
    assert tuned(OTHER) == table


def test_a_broken_file_is_measured_anew(caplog: pytest.LogCaptureFixture) -> None:
    path = cache_file(OTHER)
    for text in ("{", '{"format": 99, "device": "x", "shapes": []}', '{"format": 1}', "[]"):
        path.write_text(text)
        tuned.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert tuned(OTHER).entries == {}
        assert "is measured anew" in caplog.text
        caplog.clear()


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(speed_table.CACHE_VARIABLE, str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        save(SpeedTable(OTHER))
    assert speed_table.CACHE_VARIABLE in caplog.text


def test_between_measured_rows_it_interpolates() -> None:
    assert interpolate({16: 1.0, 256: 3.0}, 64) == pytest.approx(2.0)
    assert interpolate({16: 1.0, 256: 3.0}, 1) == 1.0
    assert interpolate({16: 1.0, 256: 3.0}, 10**6) == 3.0


def test_an_unknown_gpu_is_measured_once_for_each_power_of_two(other_gpu: list[int]) -> None:
    assert measured.speedup(LINEAR, 100) == 1.5
    assert measured.speedup(LINEAR, 128) == 1.5
    assert measured.speedup(LINEAR, 65) == 1.5
    assert other_gpu == [128]
    tuned.cache_clear()
    assert measured.speedup(LINEAR, 128) == 1.5, "the measurement was not kept on disk"
    assert other_gpu == [128]


def test_nothing_is_measured_while_a_graph_is_captured(
    other_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "can_measure", lambda query: False)
    assert measured.speedup(LINEAR, 128) is None
    assert other_gpu == []


def test_own_measurements_come_before_shipped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "device_name", lambda device: "NVIDIA H200")
    ours = shipped("NVIDIA H200")
    assert ours is not None
    assert measured.speedup(LINEAR, 1024) == ours.entries[SHAPE][1024]
    tuned("NVIDIA H200").add(SHAPE, 1024, 9.0)
    assert measured.speedup(LINEAR, 1024) == 9.0


def test_shapes_of_a_model_and_of_siblings_together(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=32,
    ).save_pretrained(tmp_path)  # fmt: skip
    found = {(shape.out_features, shape.in_features) for shape in command.shapes_of(str(tmp_path))}
    assert {(64, 64), (32, 64), (64 + 32 + 32, 64), (128, 64), (256, 64), (64, 128)} <= found


def test_what_it_prints(other_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixq_compile.cli.models.resolve_device", lambda name: GPU)
    data = mixq_json("tune", "--shape", "96,64", "--rows", "1,16")
    assert data["shapes"] == [
        {"bits": 8, "out_features": 96, "in_features": 64, "speedup": {"1": 1.5, "16": 1.5}}
    ]
    assert Path(data["file"]).is_file()
    assert other_gpu == [1, 16]


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "give MODEL, or --shape N,K" in " ".join(mixq("tune", code=2).output.split())
    on_cpu = mixq("tune", "--shape", "96,64", "--device", "cpu", code=1).output
    assert "On a CPU each shape is measured" in " ".join(on_cpu.split())
    monkeypatch.setattr("mixq_compile.cli.models.resolve_device", lambda name: GPU)
    monkeypatch.setattr(measured, "device_name", lambda device: OTHER)
    missing = mixq("tune", tmp_path / "nowhere", code=2).output
    assert "is no Hugging Face model that could be read" in " ".join(missing.split())
